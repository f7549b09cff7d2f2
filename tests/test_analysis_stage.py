"""The analysis stage from audio to tables and figures: extraction, settings, and what it does without phones."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys

import numpy as np
import pytest
import soundfile
import torch

from espnet_mamba.analysis import parts, stage
from espnet_mamba.analysis.settings import AnalysisSettings, load_settings
from espnet_mamba.analysis.stage import run_analysis
from espnet_mamba.analysis.statistics import choose_utterances, collect_features
from espnet_mamba.analysis.table import COLUMNS, LayerValue, read_table_csv, write_table_csv
from espnet_mamba.bin import analyse
from espnet_mamba.data.kaldi import Segment, write_ctm, write_table
from espnet_mamba.data.manifest import read_manifest
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.targets.features import open_features

SETTINGS = """
mine_utterances: 3
mine_seeds: 2
per_utterance_utterances: 2
ksg: {held_out_frames: 120, groups: 2}
mine_paper: {epochs: 2, minibatch: 32}
bounds: {steps: 10, batch_frames: 48, check_every: 5, check_frames: 100, held_out_frames: 200, seeds: 2, resamples: 50,
         block_frames: 5, guard_frames: 1}
purity: {clusters: [4, 8], iterations: 5, resamples: 50}
similarity: {views: [logmel, phones, speaker, emotion], folds: 4, nulls: 2, cca: {trials: 2}}
probes: {resamples: 50, null_draws: 2}
reconstruction: {hidden: 4, steps: 10, check_every: 5, seeds: 2, resamples: 50}
discrete: {clusters: [4], iterations: 5, shuffles: 2, resamples: 50}
"""


def write_set(folder, count, seed):
    """Write a set of tones: each utterance two phones around silence, each phone its own pitch."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tables = {name: {} for name in ("wav.scp", "utt2spk", "utt2num_samples", "text")}
    segments = {}
    for index in range(count):
        utt_id, num_samples = f"s{seed}-u{index:02d}", 16000 + 1000 * index
        times, wav = np.arange(num_samples) / 16000, 0.01 * rng.standard_normal(num_samples)
        segments[utt_id] = []
        for phone, start, end, pitch in (("a", 0.2, 0.5, 300), ("b", 0.5, 0.8, 1700)):
            inside = (times >= start) & (times < end)
            wav[inside] += 0.3 * np.sin(2 * math.pi * pitch * times[inside])
            segments[utt_id].append(Segment(start, end, phone))
        soundfile.write(folder / f"{utt_id}.wav", wav.astype(np.float32), 16000)
        values = (str(folder / f"{utt_id}.wav"), "s", str(num_samples), "x")
        for name, value in zip(tables, values, strict=True):
            tables[name][utt_id] = value
    for name, table in tables.items():
        write_table(folder / name, table)
    write_ctm(folder / "phones.ctm", segments)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("analysis")
    for seed, name in enumerate(("dev", "test")):
        write_set(root / "dump" / name, 8, seed)
    config = HubertConfig(
        conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (16, 2, 2)),
        embed_dim=16,
        num_layers=2,
        state_size=2,
        expand=1,
        position="none",
    )
    for seed, name in enumerate(("pretrained", "random")):
        torch.manual_seed(seed)
        save_checkpoint(HubertModel(config), root / name)
    (root / "settings.yaml").write_text(SETTINGS)
    return root


def run(place, out_dir, *extra):
    systems = [f"pretrained={place / 'pretrained'}", f"random={place / 'random'}", "fbank=logmel"]
    arguments = ["analyse", "--config", str(place / "settings.yaml"), "--dump_dir", str(place / "dump")]
    arguments += ["--train_set", "dev", "--test_set", "test", "--out_dir", str(out_dir), *extra]
    for system in systems:
        arguments += ["--system", system]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        analyse.main()


@pytest.fixture
def undrawn(monkeypatch):
    """Leave out the figures per measure, which take most of the time."""
    monkeypatch.setattr(stage, "plot_layers", lambda *_: None)


@pytest.fixture(scope="module")
def results(place):
    run(place, place / "out")
    return place / "out"


def test_every_layer_of_every_system_is_measured(results):
    rows = read_table_csv(results / "mutual_information.csv")
    values = [row for row in rows if row.measure == "mutual_information"]
    measured = {(row.system, row.estimator, row.reference, row.layer) for row in values}
    layers = {"layer0": (1, 2), "conv": (0, 1, 2), "logmel": (0, 1, 2)}
    bounds = [f"{name}_heldout" for name in ("dv", "infonce", "smile", "nwj")]
    estimators = ["mine_paper", "mine_paper_reuse", "ksg4", *bounds, *(f"{name}_per_utterance" for name in bounds)]
    assert measured == {
        (system, estimator, reference, layer)
        for system in ("pretrained", "random")
        for estimator in estimators
        for reference, own in layers.items()
        for layer in own
    }
    assert all(math.isfinite(row.value) and math.isfinite(row.null) and row.unit == "nats" for row in values)
    assert {row.num_seeds for row in values if row.estimator != "ksg4"} == {2}
    bias = {(row.estimator, row.reference) for row in rows if row.measure == "mutual_information_bias"}
    assert bias == {("ksg4", reference) for reference in layers}
    purity = read_table_csv(results / "purity.csv")
    assert {(row.system, row.layer_name) for row in purity if row.system == "fbank"} == {("fbank", "logmel")}
    spoken = [row for row in purity if row.measure == "phone_purity" and row.reference == "phones"]
    assert len(spoken) == 2 * (3 + 3 + 1)
    assert {row.num_frames for row in spoken} == {8 * 30}  # 0.6 s of two tones at 50 Hz in each utterance
    assert next(r for r in spoken if r.system == "fbank" and r.estimator == "kmeans8").value > 0.95


def test_other_measures_stand_in_one_table_with_a_figure_each(results):
    rows = read_table_csv(results / "layers.csv")
    measures = {row.measure for row in rows}
    assert {"phone_accuracy", "reconstruction", "cca_mean", "cka", "discrete_information"} <= measures, measures
    assert {row.system for row in rows} == {"pretrained", "random", "fbank"}
    ridge = [row for row in rows if row.estimator == "ridge" and row.system == "fbank"]
    assert [row.value for row in ridge] == [pytest.approx(1.0, abs=0.01)], "log-mel can be read back from itself"
    notes = " ".join(json.loads((results / "analysis.json").read_text())["notes"])
    assert "utt2emotion" in notes and "speaker" in notes, "what is left out is said"
    figures = sorted(path.name for path in (results / "layers").glob("*.png"))
    assert len(figures) >= 4 and all((results / "layers" / name).stat().st_size > 5000 for name in figures)


def test_comparison_and_figures_are_written(results):
    comparison = json.loads((results / "purity_comparison.json").read_text())
    assert comparison["clusters"] == 8 and set(comparison["by_clusters"]) == {"4", "8"}
    assert comparison["low"] <= comparison["value"] <= comparison["high"]
    assert set(comparison["best_layers"]) == {"pretrained", "random", "fbank"}
    for name in ("mutual_information", "purity"):
        assert (results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        text = (results / f"{name}.svg").read_text()
        assert "<svg" in text and text.count("<path") > 50


def test_the_same_seed_gives_the_same_bytes(place, results, undrawn):
    run(place, place / "again")
    for name in ("mutual_information.csv", "purity.csv", "purity_comparison.json", "purity.svg"):
        assert (place / "again" / name).read_bytes() == (results / name).read_bytes(), name


def test_a_killed_run_goes_on_after_the_last_finished_system(place, results, tmp_path, monkeypatch, undrawn, capsys):
    shutil.copytree(results / "parts", tmp_path / "out/parts")
    for part in (tmp_path / "out/parts").glob("random-*.json"):
        part.unlink()  # killed in the second system: its counts may be there, its record is not
    extracted = []
    monkeypatch.setattr(stage, "collect_features", lambda *a: extracted.append(a[-1]) or collect_features(*a))
    run(place, tmp_path / "out")
    assert extracted == ["logmel", "random test", "random dev"]
    said = capsys.readouterr().out
    assert "pretrained: read back from an earlier run, 1 of 3" in said and "random: done in" in said
    for name in ("mutual_information.csv", "purity.csv", "layers.csv", "purity_comparison.json"):
        assert (tmp_path / "out" / name).read_bytes() == (results / name).read_bytes(), name


def test_another_model_or_setting_is_another_part(place, tmp_path):
    def key(system="a", path="pretrained", **settings):
        return parts.part_key({"system": system, **settings}, [place / path])

    assert key() == key() and len({key(), key("b"), key(path="random"), key(path="none"), key(seed=1)}) == 5
    before, weights = key(), next((place / "pretrained").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    assert key() != before


def test_without_phones_purity_is_left_out_and_said(place, tmp_path, undrawn, capsys):
    ctm = place / "dump/test/phones.ctm"
    hidden = ctm.rename(ctm.with_suffix(".hidden"))
    try:
        run(place, tmp_path / "out", "--max_utterances", "6")
    finally:
        hidden.rename(ctm)
    assert "phone purity is left out" in capsys.readouterr().out
    assert (tmp_path / "out/mutual_information.csv").is_file() and not (tmp_path / "out/purity.csv").exists()
    record = json.loads((tmp_path / "out/analysis.json").read_text())
    assert record["num_utts"] == [6, 6] and "phones.ctm" in record["notes"][0]


def test_extraction_hangs_on_neither_order_nor_batches(place, monkeypatch):
    source, utterances = open_features(str(place / "pretrained")), read_manifest(place / "dump/test")
    together = collect_features(source, utterances)
    assert together.names == ["layer0", "layer1", "layer2"]  # and no conv unless it is asked for
    assert together.sizes == [(u.num_samples - 400) // 320 + 1 for u in utterances]
    one_by_one = [collect_features(source, [utterance]).layers[2] for utterance in reversed(utterances)]
    assert torch.allclose(together.layers[2], torch.cat(one_by_one[::-1]), atol=1e-4)


def test_memory_limit_chooses_the_same_fewer_utterances(place):
    utterances = read_manifest(place / "dump/test")
    everything = choose_utterances(utterances, None, 100.0, 64, seed=0)
    fewer = choose_utterances(utterances[::-1], None, 0.012, 64, seed=0)
    assert len(everything) == 8 and 0 < len(fewer) < 8
    assert fewer == choose_utterances(utterances, None, 0.012, 64, seed=0)
    assert sum(u.num_samples // 320 * 64 for u in fewer) <= 0.012 * 2**20
    with pytest.raises(ValueError, match="raise max_memory_mb"):
        choose_utterances(utterances, None, 1e-4, 64, seed=0)


def test_table_survives_the_round_trip_and_names_what_is_missing(tmp_path):
    row = LayerValue("random", 1, "layer1", "pnmi", "kmeans50", "phones", 0.25, num_frames=3, unit="fraction")
    write_table_csv(tmp_path / "t.csv", [row])
    back = read_table_csv(tmp_path / "t.csv")[0]
    assert back.value == 0.25 and back.num_frames == 3 and math.isnan(back.low)
    (tmp_path / "old.csv").write_text(",".join(name for name in COLUMNS if name != "null") + "\n")
    with pytest.raises(ValueError, match="old.csv: column 'null' is missing"):
        read_table_csv(tmp_path / "old.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bounds: {step: 3}", "unknown key 'step', did you mean 'steps'"),
        ("purities: {}", "unknown key 'purities', did you mean 'purity'"),
        ("references: [mfcc]", "'mfcc' is not one of: layer0 conv logmel"),
        ("information: [mine]", "'mine' is not one of: mine_paper mine_paper_reuse bounds ksg"),
        ("mine_paper: {reuse_critic: true}", "name mine_paper_reuse under information"),
        ("ksg: {neighbors: 3}", "did you mean 'neighbours'"),
        ("dtype: int8", "'int8' is not one of"),
    ],
)
def test_wrong_settings_are_named(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_settings(tmp_path / "s.yaml")


def test_shipped_settings_load(request):
    folder = request.config.rootpath / "conf/analysis"
    settings = {path.stem: load_settings(path) for path in folder.glob("*.yaml")}
    for own in (AnalysisSettings(), settings["mini"]):
        assert own.bounds.seeds >= 5 and own.mine_seeds >= 5
    assert settings["smoke"].bounds.steps < settings["mini"].bounds.steps


@pytest.mark.parametrize("system", ["pretrained", "=x", "a="])
def test_a_system_without_a_place_is_refused(monkeypatch, system):
    arguments = ["--config", "c", "--dump_dir", "d", "--train_set", "t", "--test_set", "t", "--out_dir", "o"]
    monkeypatch.setattr(sys, "argv", ["analyse", *arguments, f"--system={system}"])
    with pytest.raises(ValueError, match="expected NAME=SPEC"):
        analyse.main()


def test_missing_set_is_refused_before_any_work(place, tmp_path):
    settings = load_settings(place / "settings.yaml")
    with pytest.raises(FileNotFoundError, match="stage 2"):
        run_analysis(settings, place / "dump", ("dev", "nowhere"), {"fbank": "logmel"}, tmp_path)
