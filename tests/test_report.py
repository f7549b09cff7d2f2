"""The report from made-up results: its numbers are the files' numbers, it stands alone, it names what is missing."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser

import pytest

from espnet_mamba.analysis.layer_plots import plot_layers
from espnet_mamba.analysis.plots import plot_mutual_information, plot_purity
from espnet_mamba.analysis.report_blocks import duration, number, percent
from espnet_mamba.analysis.table import LayerValue, read_table_csv, write_table_csv
from espnet_mamba.bin import report

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that tags close in order; collects headings and sources."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.sources, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def interval(value, width):
    return {"value": value, "low": value - width, "high": value + width}


def make_results(root):
    for number_, name, seconds in ((1, "data", 31.2), (4, "pretrain1", 301.5)):
        record = {"number": number_, "name": name, "purpose": "p", "command": f"./run.sh --stage {name} | tee <log>"}
        record |= {"options": {}, "seconds": seconds, "peak_memory_mb": 812.4, "status": "done"}
        write(root / f"tag/stages/{number_:02d}_{name}.json", record)
    quality = {"purity": 0.412, "cluster_purity": 0.101, "pnmi": 0.355, "used_clusters": 97, "num_frames": 12345}
    sets = {"dev": {"all": quality, "no_silence": quality | {"purity": 0.287}}}
    write(root / "targets1/quality.json", {"source": "mfcc100", "layer": 0, "num_clusters": 100, "sets": sets})
    log = root / "pretrain1/train_log.jsonl"
    log.parent.mkdir(parents=True)
    rows = [
        {"step": step, "split": split, "loss": 5.0 - step / 100, "loss_masked": 4.0 - step / 100}
        | {"feature_penalty": 0.1, "accuracy_masked": step / 1000, "seconds": 40.0}
        for step in (100, 200)
        for split in ("train", "valid")
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 300, "sp')
    for system, wer in (("random", 0.234), ("pretrained", 0.1237), ("fbank", 0.2)):
        score = {"system": system, "wer": wer, "wer_low": wer - 0.02, "wer_high": wer + 0.02, "substitutions": 11}
        score |= {"insertions": 2, "deletions": 3, "num_words": 512, "num_utts": 100}
        write(root / f"asr/{system}/score.json", score | {"cer": 0.1, "cer_low": 0.09, "cer_high": 0.11})
        result = {"task": "ic", "system": system, "metric": "accuracy", "num_utts": 99} | interval(0.9 - wer, 0.2)
        write(root / f"superb/{system}/result.json", result)
    write(root / "asr/comparison.json", {"metric": "wer", "against": "random", "difference": interval(-0.1103, 0.03)})
    make_analysis(root / "analysis_tag")
    header = "model,num_parameters,device,num_threads,mode,batch,batch_size,macs_per_second,audio_seconds,wall_median,"
    header += "wall_min,wall_max,rtf,"
    row = "tiny,1000,cpu,2,eval,one,1,78000000,5.0,0.0512,0.05,0.06,0.01024,500.0,23.5,5"
    row += "\nslow,1000,cpu,2,train,seconds,4,78000000,5.0,0.5,0.5,0.6,0.1,500.0,23.5,5"
    (root / "eff").mkdir()
    (root / "eff/efficiency.csv").write_text(f"{header}peak_memory_mb,extra_memory_mb,num_repeats\n{row}\n")
    (root / "model.yaml").write_text("embed_dim: 128  # <width> & more\n")


def make_analysis(folder):
    best = {
        system: {"layer": 2, "layer_name": name, "phone_purity": interval(value, 0.01), "pnmi": interval(value, 0.02)}
        for system, name, value in (
            ("pretrained", "layer2", 0.345),
            ("random", "layer0", 0.25),
            ("fbank", "logmel", 0.3),
        )
    }
    difference = {"pretrained - random": {"phone_purity": interval(0.095, 0.01), "pnmi": interval(0.01, 0.02)}}
    comparison = {"clusters": 100, "best_layers": best, "differences": difference}
    write(folder / "purity_comparison.json", comparison)
    rows = [
        LayerValue(system, layer, f"layer{layer}", measure, estimator, reference, 1.25, 1.1, 1.4, 0.01, 6.9, unit)
        for system in ("pretrained", "random")
        for layer in (1, 2)
        for measure, estimator, reference, unit in (
            ("mutual_information", "dv_heldout", "layer0", "nats"),
            ("phone_purity", "kmeans100", "phones", "fraction"),
            ("pwcca", "heldout_10folds", "phones", "correlation"),
            ("cka", "all_rows", "phones", "correlation"),
        )
    ]
    similarity = [row for row in rows if row.unit == "correlation"]
    write_table_csv(folder / "layers.csv", similarity)
    plot_layers(similarity, folder / "layers")
    for name, plot, measure in (
        ("mutual_information", plot_mutual_information, "mutual_information"),
        ("purity", plot_purity, "phone_purity"),
    ):
        own = [row for row in rows if row.measure == measure]
        write_table_csv(folder / f"{name}.csv", own)
        plot(own, folder / name)


def run(root, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report", "--tag", "tag", "--exp_dir", str(root), *map(str, arguments)])
        report.main()
    return (root / "tag/RESULTS.md").read_text(), (root / "tag/report.html").read_text()


@pytest.fixture(scope="module")
def root_of_rendered(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def rendered(root_of_rendered):
    root = root_of_rendered
    make_results(root)
    places = ["--targets", root / "targets1", "--pretrain", root / "pretrain1", "--asr_dir", root / "asr"]
    places += ["--superb_dir", root / "superb", "--efficiency_dir", root / "eff", "--config", root / "model.yaml"]
    return run(root, *places)


def row_of(markdown, start):
    return next(line for line in markdown.splitlines() if line.startswith(f"| {start} |"))


def test_numbers_are_those_of_the_files(rendered):
    markdown, page = rendered
    assert row_of(markdown, "WER (%)") == (
        "| WER (%) | 12.4 [10.4, 14.4] | 23.4 [21.4, 25.4] | 20.0 [18.0, 22.0] | yes (-11.0 [-14.0, -8.0]) |"
    )
    assert "| 34.5 [33.5, 35.5] | 25.0 [24.0, 26.0] | 30.0 [29.0, 31.0] | yes (+9.5 [8.5, 10.5]) |" in markdown
    assert (
        row_of(markdown, "pretrained")
        == "| pretrained | 12.4 [10.4, 14.4] | 11 | 2 | 3 | 512 | 10.0 [9.0, 11.0] | 100 |"
    )
    assert row_of(markdown, "targets1").startswith("| targets1 | mfcc100 | dev | all | 100 | 97 | 41.2 | 10.1 | 35.5 |")
    assert row_of(markdown, "pretrain1") == "| pretrain1 | train | 200 | 3.000 | 2.000 | 20.0 | 1 min 20 s |"
    assert row_of(markdown, "tiny") == "| tiny | 5 | 1 | 0.078 | 0.0512 [0.0500, 0.0600] | 0.0102 | 24 | 2 | cpu |"
    assert row_of(markdown, "slow") == "| slow | 5 | 4 | 0.078 | 0.5000 [0.5000, 0.6000] | 0.1000 | 24 | 2 | cpu |"
    assert "| 4 | pretrain1 | done | 5 min 02 s | 812 |" in markdown
    for cell in ("12.4 [10.4, 14.4]", "1.250 [1.100, 1.400]", "yes (-11.0 [-14.0, -8.0])", "5 min 02 s"):
        assert f">{cell}<" in page


def test_verdicts_are_not_generous(rendered):
    markdown, _ = rendered
    assert row_of(markdown, "PNMI (%), K = 100").endswith("| ahead, within the interval (+1.0 [-1.0, 3.0]) |")
    assert row_of(markdown, "ic accuracy (%)").endswith("| ahead, within the intervals |")
    assert row_of(markdown, "CER (%)").endswith("| no |")


def test_page_stands_alone(rendered):
    _, page = rendered
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == [] and "script" not in parsed.tags and "link" not in parsed.tags
    assert not re.search(r"https?:", page)
    assert parsed.headings == [
        "Summary", "Targets quality", "Pretraining curves", "ASR", "SUPERB", "Layers", "Efficiency",
        "Configuration", "Versions and machine", "Stages",
    ]  # fmt: skip
    figures = [source for source in parsed.sources if source.startswith("data:")]
    assert len(figures) == 6  # training, overview, mutual information, purity, PWCCA, CKA
    for source in figures:
        assert b"<svg" in base64.b64decode(source.partition("base64,")[2])
    assert all(source.startswith(("#", "data:")) for source in parsed.sources)


def test_layers_are_told_on_one_page(rendered):
    markdown, page = rendered
    layers = markdown.partition("## Layers")[2].partition("## Efficiency")[0]
    assert layers.index("layers_overview.svg") < layers.index("| measure | system | peak |") < layers.index("### ")
    peak = "| phone purity: K = 100 (fraction) | pretrained | layer1 | all | 1.250 [1.100, 1.400] | 0.010 | 6.900 |  |"
    assert peak in layers
    titles = ["Mutual information", "Phone purity", "Canonical correlation and alignment"]
    assert re.findall(r"^### (.*)", layers, re.M) == titles
    assert "[layers.csv](../analysis_tag/layers.csv)" in layers, "long tables are the page's; RESULTS.md names the file"
    folded = re.findall(r"<summary>(.*?)</summary>", page)
    assert {"further figures", "all values: mutual information per layer"} <= set(folded)
    assert not (set(re.findall(r"Missing: ([^.]*)", layers)))


def test_ssamba_has_no_targets_and_none_are_missed(tmp_path, capsys):
    markdown, page = run(tmp_path, "--targets")
    quality = markdown.partition("## Targets quality")[2].partition("##")[0]
    assert "SSAMBA has no targets" in quality and "Missing" not in quality
    assert "quality of the targets" not in capsys.readouterr().out
    markdown, _ = run(tmp_path)
    assert "Missing: the quality of the targets" in markdown


def test_figures_of_the_report_leave_their_numbers(rendered, root_of_rendered):
    points = (root_of_rendered / "tag/pretraining.csv").read_text().splitlines()
    assert points[0] == "run,split,curve,step,value" and "pretrain1,train,loss per masked frame (nats),200,2" in points
    assert "pretrain1,valid,accuracy at masked frames (%),100,10" in points
    overview = read_table_csv(root_of_rendered / "tag/layers_overview.csv")
    assert {row.measure for row in overview} == {"mutual_information", "phone_purity", "pwcca"}


def test_text_of_others_is_escaped(rendered):
    markdown, page = rendered
    assert "# &lt;width&gt; &amp; more" in page
    assert "./run.sh --stage data \\| tee <log>" in markdown and "tee &lt;log&gt;" in page


def test_everything_missing_is_named_and_not_fatal(tmp_path, capsys):
    markdown, page = run(tmp_path, "--pretrain", tmp_path / "pretrain1")
    out = capsys.readouterr().out
    for stage in ("3 (targets1)", "4 (pretrain1)", "9 (asr_decode)", "10 (superb)", "11 (analysis)", "12 (efficiency)"):
        assert stage in out and stage in markdown and stage in page
    assert "## Versions and machine" in markdown


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path / "asr/random/score.json", {"system": "random", "wer": 0.1})
    with pytest.raises(ValueError, match="random/score.json: field 'cer' is missing"):
        run(tmp_path, "--asr_dir", tmp_path / "asr")
    log = tmp_path / "pretrain1/train_log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 1\n{"step": 2, "split": "train"}\n')
    with pytest.raises(ValueError, match="train_log.jsonl, line 1: not valid JSON"):
        run(tmp_path, "--pretrain", tmp_path / "pretrain1")


def test_formats():
    assert percent(0.12345, 0.1, 0.15) == "12.3 [10.0, 15.0]"
    assert percent(None) == "–" and number(float("nan")) == "–"
    assert number(1.5, float("nan"), 2.0) == "1.500"
    assert [duration(s) for s in (8.04, 59.99, 192.0, 3599.9, 7500.0)] == [
        "8.0 s", "60.0 s", "3 min 12 s", "1 h 00 min", "2 h 05 min",
    ]  # fmt: skip
