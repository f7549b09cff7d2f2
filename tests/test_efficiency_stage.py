"""The stage of costs: what it writes, that it goes on where it was broken off, and the limits that it keeps to."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from espnet_mamba.bin.efficiency import MODELS, open_peers
from espnet_mamba.efficiency.entries import EagerAttention, Entry, entry_of_config, open_entries
from espnet_mamba.efficiency.measure import Clock, Measurement, cells_of
from espnet_mamba.efficiency.memory_limit import available_memory_mb, is_out_of_memory, limited_memory
from espnet_mamba.efficiency.prediction import Point, predict
from espnet_mamba.efficiency.samples import Cell, LeftOut, Samples
from espnet_mamba.efficiency.settings import EfficiencySettings
from espnet_mamba.efficiency.stage import run_efficiency
from espnet_mamba.efficiency.table import markdown
from espnet_mamba.efficiency.timing import make_call, num_warm_ups
from espnet_mamba.models.config import HubertConfig

TINY = HubertConfig(
    name="tiny",
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
    embed_dim=16,
    num_layers=1,
    state_size=2,
    num_heads=2,
    position="none",
)
ATTENTION = replace(TINY, name="attending", mixer="causal_attention", ffn_dim=16)
QUICK = EfficiencySettings(
    (0.5, 1.0), ("train",), 2.0, repeats=2, least_repeats=1, warm_up=1, streaming=False, minutes=2.0
)


def rows_of(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("stage")
    run_efficiency([entry_of_config(TINY), entry_of_config(ATTENTION, "eager")], QUICK, out_dir)
    return out_dir


def test_stage_writes_a_row_per_cell(written):
    rows = rows_of(written / "efficiency.csv")
    assert len(rows) == 2 * 2 * 2  # models, batches, lengths
    for row in rows:
        assert float(row["wall_min"]) <= float(row["wall_quartile1"]) <= float(row["wall_median"])
        assert float(row["wall_median"]) <= float(row["wall_quartile3"]) <= float(row["wall_max"])
        audio = int(row["batch_size"]) * float(row["audio_seconds"])
        assert float(row["rtf"]) == pytest.approx(float(row["wall_median"]) / audio, rel=1e-4)
        assert int(row["batch_size"]) == (1 if row["batch"] == "one" else 2.0 / float(row["audio_seconds"]))
        assert int(row["num_repeats"]) == 2 and int(row["num_warm_up"]) >= 1
        parts = [p for p in rows_of(written / "macs.csv") if p["model"] == row["model"]]
        parts = [p for p in parts if p["audio_seconds"] == row["audio_seconds"]]
        assert sum(int(p["macs_per_second"]) for p in parts) == pytest.approx(int(row["macs_per_second"]), abs=20)
    figures = ("efficiency_train", "efficiency_train_batch", "macs")
    for name in [f"{name}.{kind}" for name in figures for kind in ("svg", "png")]:
        assert (written / name).stat().st_size > 0
    assert json.loads((written / "efficiency.json").read_text())["num_threads"] == torch.get_num_threads()


def test_a_second_run_measures_nothing_again_and_more_repeats_go_on(written, monkeypatch):
    monkeypatch.setattr("espnet_mamba.efficiency.stage._plot", lambda *_: None)
    before = (written / "samples.jsonl").read_text()
    entries = [entry_of_config(TINY), entry_of_config(ATTENTION, "eager")]
    run_efficiency(entries, QUICK, written)
    assert (written / "samples.jsonl").read_text() == before
    run_efficiency(entries, replace(QUICK, repeats=3), written)
    after = (written / "samples.jsonl").read_text()
    assert after.startswith(before) and after.count("\n") == before.count("\n") + 8


def test_samples_of_another_setting_are_set_aside_and_a_torn_line_is_left(tmp_path, capsys):
    cell = Cell("m", "eval", "one", 1, 2.0)
    samples = Samples(tmp_path / "s.jsonl", {"device": "CPU, 2 threads"})
    samples.add("memory", [10.0, 1.0, 0.25], cell)
    samples.add("wall", 0.5, cell)
    with open(tmp_path / "s.jsonl", "a") as handle:
        handle.write('{"kind": "wall", "val')
    again = Samples(tmp_path / "s.jsonl", {"device": "CPU, 2 threads"})
    assert again.walls[cell] == [0.5] and again.memory[cell] == (10.0, 1.0) and again.first_wall[cell] == 0.25
    again.add("wall", 0.75, cell)
    assert Samples(tmp_path / "s.jsonl", {"device": "CPU, 2 threads"}).walls[cell] == [0.5, 0.75]
    other = Samples(tmp_path / "s.jsonl", {"device": "CPU, 1 threads"})
    assert not other.walls and (tmp_path / "s.old").is_file()
    assert "CPU, 2 threads, now CPU, 1 threads" in capsys.readouterr().out


@pytest.mark.parametrize("of", [lambda t, x: 3 * t, lambda t, x: 2 * t + 0.5 * t * x, lambda t, x: 7 + t + t * x])
def test_growth_is_predicted(of):
    points = [Point(b, x, of(b * x, x)) for b, x in ((1, 1.0), (1, 2.0), (1, 5.0), (4, 2.0))]
    for batch_size, seconds in ((1, 20.0), (8, 10.0)):
        assert predict(points, batch_size, seconds) == pytest.approx(of(batch_size * seconds, seconds), rel=1e-6)


def test_one_point_is_taken_to_grow_with_the_square():
    assert predict([Point(1, 2.0, 5.0)], 1, 4.0) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="measure a short one first"):
        predict([], 1, 4.0)


def test_what_will_not_fit_is_left_out_with_its_longer_ones(tmp_path, capsys):
    settings = replace(QUICK, lengths=(1.0, 2.0, 4.0, 8.0, 16.0), modes=("train",), batch_seconds=0.0)
    settings = replace(settings, memory_limit_mb=400.0)
    samples = Samples(tmp_path / "s.jsonl", {})
    measurement = Measurement([Growing.entry()], settings, samples, Clock(1.0))
    (left,) = measurement.run()
    assert left.reason == "memory" and left.cell.audio_seconds == 16.0  # 40 MiB a second
    assert left.limit == 400.0 and left.predicted == pytest.approx(640.0, rel=0.2)
    assert sorted(cell.audio_seconds for cell in samples.cells) == [1.0, 2.0, 4.0, 8.0]
    assert "the limit is 400 MiB: a machine with more memory" in capsys.readouterr().out


class Growing(nn.Module):
    """40 MiB per second of audio: far above what the allocator and other threads add or keep."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    @classmethod
    def entry(cls):
        return Entry("growing", cls, None)

    def extract_features(self, wavs, num_samples):
        return [self.scale * torch.ones(wavs.numel() * 655360 // 16000 * 16).sum()], num_samples


def test_minutes_are_kept_and_a_remedy_is_named(tmp_path):
    cell = Cell("growing", "eval", "one", 1, 1.0)
    samples = Samples(tmp_path / "s.jsonl", {})
    samples.add("memory", [1.0, 1.0, 20.0], cell)  # an earlier run found 20 s a call
    settings = replace(QUICK, lengths=(1.0, 2.0), modes=("eval",), batch_seconds=0.0, minutes=0.5)
    left, untimed = Measurement([Growing.entry()], settings, samples, Clock(0.01)).run()
    assert left.reason == "minutes" and left.cell.audio_seconds == 2.0
    assert "--minutes" in left.note and not samples.cells
    assert untimed.cell == cell and "no time was left for a timed call (20.0 s)" in untimed.note


def test_a_failed_allocation_is_an_answer(tmp_path):
    class Greedy(Growing):
        def extract_features(self, wavs, num_samples):
            if wavs.shape[1] > 16000:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
            return super().extract_features(wavs, num_samples)

    settings = replace(QUICK, lengths=(0.5, 1.0, 2.0), modes=("eval",), batch_seconds=0.0)
    samples = Samples(tmp_path / "s.jsonl", {})
    (left,) = Measurement([Entry("greedy", Greedy)], settings, samples, Clock(1.0)).run()
    assert left.reason == "memory" and left.cell.audio_seconds == 2.0 and math.isnan(left.predicted)
    assert len(samples.cells) == 2


def test_the_wall_before_the_end_of_memory():
    if not 0 < available_memory_mb() < float("inf"):
        pytest.skip("the system does not say how much memory is left")
    with pytest.raises(RuntimeError) as caught, limited_memory(64.0):
        torch.ones(64 * 2**20)  # 256 MiB
    assert is_out_of_memory(caught.value)
    assert torch.ones(64 * 2**20).sum() == 64 * 2**20
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_lengths_without_a_frame_and_small_batches_have_no_cell():
    settings = EfficiencySettings((0.01, 1.0), ("eval",), 1.5)
    assert cells_of([entry_of_config(TINY)], settings, 0.01) == []
    assert [cell.batch for cell in cells_of([entry_of_config(TINY)], settings, 1.0)] == ["one"]
    assert num_warm_ups(0.01, 10, 2.0) == 10 and num_warm_ups(0.5, 10, 2.0) == 4 and num_warm_ups(60.0, 10, 2.0) == 1


@pytest.mark.parametrize("variant", ["eager", "mask_per_call"])
def test_other_ways_of_attention_give_the_same(variant):
    fused = entry_of_config(ATTENTION).build().eval()
    other = entry_of_config(ATTENTION, variant).build()
    other.model.load_state_dict(fused.state_dict())
    other.eval()
    assert isinstance(other, EagerAttention)
    with torch.inference_mode():
        for num_samples in (8000, 16000):
            wavs = torch.randn(2, num_samples)
            expected, actual = fused.extract_features(wavs)[0], other.extract_features(wavs)[0]
            torch.testing.assert_close(actual[-1], expected[-1], atol=1e-5, rtol=1e-4)


def test_training_reaches_the_parameters_and_leaves_no_gradients():
    model, seen = entry_of_config(TINY).build(), []
    model.projection.weight.register_hook(lambda grad: seen.append(float(grad.abs().sum())))
    make_call(model, "train", 2, 0.5, "cpu")()
    assert seen[0] > 0 and model.training and all(p.grad is None for p in model.parameters())
    make_call(model, "eval", 1, 0.5, "cpu")()
    assert len(seen) == 1 and not model.training


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no model to measure"):
        open_entries([], [], MODELS, {})
    with pytest.raises(ValueError, match="two models are called 'mamba_tiny'"):
        open_entries([], ["mamba_tiny", "mamba_tiny"], MODELS, {})
    with pytest.raises(ValueError, match="'eagre' is not one of: eager mask_per_call"):
        open_entries([], ["transformer_tiny:eagre"], MODELS, {})
    with pytest.raises(ValueError, match="mixer 'mamba' has no such attention"):
        open_entries([], ["mamba_tiny:eager"], MODELS, {})
    with pytest.raises(FileNotFoundError, match="did you mean 'mamba_tiny'"):
        open_entries([], ["mamba_tyni"], MODELS, {})
    with pytest.raises(ValueError, match="0.01 s: the least is 0.025 s"):
        run_efficiency([entry_of_config(TINY)], replace(QUICK, lengths=(0.01,)), tmp_path)
    with pytest.raises(ValueError, match="'evla' is not one of: eval train"):
        EfficiencySettings(modes=("evla",))


def test_a_peer_that_cannot_run_says_why(capsys):
    assert open_peers(["mamba_base:mamba_ssm"], MODELS, "cpu") == {}
    assert "mamba_base:mamba_ssm: skipped; mamba_ssm" in capsys.readouterr().out


def test_the_table_says_where_a_model_ends_and_what_the_paper_shows():
    cell = Cell("tiny", "eval", "one", 1, 10.0)
    row = {"model": "tiny", "mode": "eval", "batch": "one", "audio_seconds": 5.0, "rtf": 0.125, "num_parameters": 10**6}
    own = entry_of_config(TINY)
    for entry, paper in ((own, "flat to 320 s"), (replace(own, is_peer=True), "–")):
        text = markdown([entry], [row], [LeftOut(cell, "memory", 9.0, 5.0, "why")], "rtf", "RTF")
        assert text.splitlines()[-1] == f"| `tiny` | 1.00 | 0.125 | mem | {paper} |"
