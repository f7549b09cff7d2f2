"""The mini recipe through run.sh itself, all 13 stages with tiny settings; then parts of it again, as a user would."""

import json
import os
import re
import shutil
import subprocess

import pytest

from espnet_mamba.recipe.table import read_table

pytestmark = [pytest.mark.end_to_end, pytest.mark.espnet]

TINY = [
    "--num_clusters1=20",
    "--num_clusters2=20",
    "--pretrain_args=--max_steps 6 --num_iters_per_epoch 3 --batch_bins 160000 --log_interval 1",
    "--nbpe=40",
    "--asr_args=--max_epoch 1",
    "--superb_args=--total_steps 4",
    "--analysis_config=smoke",
    "--efficiency_seconds=1 2",
    "--efficiency_args=--repeats 2",
]


def run(root, *options, **kwargs):
    return subprocess.run(
        [str(root / "egs2/mini/ssl1/run.sh"), *TINY, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"ESPNET_MAMBA_NO_SETUP": "1"},
        **kwargs,
    )


@pytest.fixture(scope="module")
def checked(root, tmp_path_factory):
    """Two minutes of speech, as stages 1 and 2 leave them."""
    where = tmp_path_factory.mktemp("mini")
    options = ["--minutes", 2, "--expdir", where / "exp", "--datadir", where / "data", "--dumpdir", where / "dump"]
    result = run(root, *options, "--stop_stage", "check")
    assert result.returncode == 0, result.stdout[-4000:]
    return where / "exp", options


@pytest.fixture(scope="module")
def finished(root, checked):
    exp, options = checked
    result = run(root, *options)
    assert result.returncode == 0, result.stdout[-4000:]
    return exp, options


def test_ssamba_from_speech_to_upstream(checked, root):
    exp, options = checked
    options = [*options, "--model", "ssamba_mini", "--stage", "targets1", "--stop_stage", "upstream"]
    result = run(root, *options)
    assert result.returncode == 0, result.stdout[-4000:]
    for stage in ("3 (targets1)", "4 (pretrain1)", "5 (targets2)"):
        assert f"stage {stage}: not needed, since SSAMBA predicts patches and has no targets; skipped" in result.stdout
    assert {path.name for path in exp.iterdir() if "ssamba" in path.name} == {
        "ssamba_mini_mini", "pretrain_ssamba_mini_mini_it2", "upstream_ssamba_mini_mini",
        "upstream_ssamba_mini_mini_random",
    }  # fmt: skip
    rows = map(json.loads, (exp / "pretrain_ssamba_mini_mini_it2/train_log.jsonl").read_text().splitlines())
    losses = [row["loss"] for row in rows if row["split"] == "valid"]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert result.stdout.count("'rate': 320") == 2, "both folders go through S3PRL at 50 Hz"
    for folder in ("upstream_ssamba_mini_mini", "upstream_ssamba_mini_mini_random"):
        assert json.loads((exp / folder / "config.json").read_text())["format"] == "espnet-mamba SsambaModel"
    result = run(root, *options)
    assert result.returncode == 0 and result.stdout.count("; skipped") == 5, result.stdout


def test_all_stages(finished, root):
    exp, _ = finished
    tag = exp / "extbimamba_tiny_mini"
    for stage in read_table(root / "egs2/TEMPLATE/ssl1/stages.tsv"):
        record = json.loads((tag / f"stages/{stage.number:02d}_{stage.name}.json").read_text())
        assert record["status"] == "done" and record["seconds"] > 0, stage.name
        assert (tag / f"stages/{stage.number:02d}_{stage.name}.sh").is_file()
    results = (tag / "RESULTS.md").read_text()
    for system in ("pretrained", "random", "fbank"):
        score = json.loads((exp / "asr_extbimamba_tiny_mini" / system / "score.json").read_text())
        assert score["num_utts"] > 0 and score["wer_low"] <= score["wer"] <= score["wer_high"]
        assert system in results
    html = (tag / "report.html").read_text()
    assert html.count("<svg") + html.count("data:image") >= 4
    assert not re.search(r"""(src|href)=["']https?:""", html)


def test_second_run_skips_every_stage(finished, root):
    _, options = finished
    result = run(root, *options)
    assert result.returncode == 0 and result.stdout.count("; skipped") == 13, result.stdout


def test_some_stages_again(finished, root):
    exp, options = finished
    shutil.rmtree(exp / "upstream_extbimamba_tiny_mini")
    result = run(root, *options, "--stage", "pretrain2", "--stop_stage", "upstream")
    assert result.returncode == 0, result.stdout
    assert "stage 6 (pretrain2): done" in result.stdout
    assert re.search(r"stage 7 \(upstream\): runs again, since \S+ is missing", result.stdout)
    result = run(root, *options, "--stage", "superb", "--stop_stage", "superb", "--superb_args", "--total_steps 5")
    assert result.returncode == 0 and "--total_steps was '4', now '5'" in result.stdout, result.stdout[-2000:]


def test_own_corpus(root, tmp_path, so762):
    """Recorded speech in a Kaldi-style folder with relative paths, a few utterances of it, as far as the labels."""
    corpus = tmp_path / "mine"
    corpus.mkdir()
    (corpus / "audio").symlink_to(so762 / "audio")
    for name in ("train", "dev", "test"):
        (corpus / name).mkdir()
        for table in ("wav.scp", "text", "utt2spk", "phones.ctm"):
            lines = (so762 / name / table).read_text().splitlines(keepends=True)
            keep = {line.split()[0] for line in (so762 / name / "wav.scp").read_text().splitlines()[:12]}
            (corpus / name / table).write_text("".join(line for line in lines if line.split()[0] in keep))
    where = ["--expdir", tmp_path / "exp", "--datadir", tmp_path / "data", "--dumpdir", tmp_path / "dump"]
    result = run(root, "--corpus_dir", corpus, *where, "--stop_stage", "targets1")
    assert result.returncode == 0, result.stdout
    quality = json.loads((tmp_path / "exp/targets_mine_it1/quality.json").read_text())
    assert quality["sets"]["dev"]["no_silence"]["purity"] > 0.1


def test_report_opens_in_a_browser(finished, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    page = finished[0] / "extbimamba_tiny_mini/report.html"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile"]
    shot = tmp_path / "report.png"
    look = ["--enable-logging=stderr", "--window-size=1200,2400", f"--screenshot={shot}"]
    command = [chromium, *quiet, *look, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and shot.stat().st_size > 20_000, result.stderr
    assert "CONSOLE" not in result.stderr and "ERR_" not in result.stderr, result.stderr
    dom = subprocess.run([chromium, *quiet, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    for heading in ("Summary", "ASR", "SUPERB", "Layers", "Efficiency", "Stages"):
        assert heading in dom.stdout
