"""MACs by formula against a counter and the papers' arithmetic; peak memory of a known allocation; the whole stage."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from espnet_mamba.efficiency.macs import MIXER_MACS, SCAN_MACS, count_macs, macs_per_second
from espnet_mamba.efficiency.memory import _peak_by_sampling, peak_memory_mb
from espnet_mamba.efficiency.stage import open_models, run_efficiency
from espnet_mamba.layers.block import MIXERS
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.ops.selection import FORCE

SMALL = HubertConfig(
    name="small",
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (16, 2, 2)),
    embed_dim=32,
    num_layers=2,
    state_size=4,
    expand=2,
    position_kernel=8,
    position_groups=4,
)
VARIANTS = [
    SMALL,
    replace(SMALL, mixer="mamba", ffn_dim=48, position="none"),
    replace(SMALL, join="concat_linear", norm="pre", front_end="conv_layer"),
    replace(SMALL, mixer="innbimamba"),
    replace(SMALL, mixer="innbimamba", share_conv=False, join="mean"),
    replace(SMALL, mixer="mamba2", head_dim=8),
    replace(SMALL, mixer="attention", num_heads=4, ffn_dim=48),
    replace(SMALL, mixer="causal_attention", num_heads=4, ffn_dim=48),
    replace(SMALL, block="macaron", join="concat_linear", ffn_dim=48),
]


@pytest.fixture
def plain_ops(monkeypatch):
    """PyTorch's counter does not see compiled kernels."""
    monkeypatch.setenv(FORCE, "torch")


def counted(config, num_samples):
    """MACs that PyTorch's counter sees: convolutions and linear layers, without the scan."""
    model = HubertModel(config).eval()
    math = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        model(torch.randn(1, num_samples))
    flops = counter.get_flop_counts()["Global"]
    products = (*LINEAR, "aten.bmm") if "attention" in config.mixer else LINEAR  # elsewhere bmm is part of the scan
    return sum(value for op, value in flops.items() if "convolution" in str(op) or str(op) in products) // 2


LINEAR = ("aten.mm", "aten.addmm")


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.block}-{c.mixer}-{c.join}-{c.position}")
@pytest.mark.parametrize("num_samples", [400, 16000, 23457])
@pytest.mark.usefixtures("plain_ops")
def test_formula_agrees_with_the_flop_counter(config, num_samples):
    parts = count_macs(config, num_samples)
    assert counted(config, num_samples) == sum(parts.values()) - parts.get("scan", 0)


def test_scan_is_three_macs_per_frame_channel_and_state():
    config = replace(SMALL, mixer="mamba")
    assert count_macs(config, 16000)["scan"] == 2 * 49 * (2 * 32) * 4 * SCAN_MACS
    assert SCAN_MACS == 3


@pytest.mark.parametrize(("mixer", "expected"), [("mamba", 6.20), ("extbimamba", 9.69)])
def test_base_models_cost_what_the_papers_sizes_give(mixer, expected):
    """docs/papers.md 8, G MACs per second of audio, analytic."""
    parts = macs_per_second(HubertConfig(mixer=mixer), 320.0)
    assert sum(parts.values()) / 1e9 == pytest.approx(expected, abs=0.006)
    assert (parts["front_end"] + parts["projection"] + parts["position"]) / 1e9 == pytest.approx(2.71, abs=0.01)


def test_every_mixer_has_a_formula_and_bad_input_is_named():
    assert MIXER_MACS.keys() == MIXERS.keys()
    with pytest.raises(ValueError, match="399 samples are shorter than one frame"):
        count_macs(SMALL, 399)
    with pytest.raises(ValueError, match="mixer 'rnn' has no formula"):
        count_macs(replace(SMALL, mixer="rnn"), 16000)


def test_head_is_counted_only_when_asked():
    assert "head" not in count_macs(SMALL, 16000)
    assert count_macs(SMALL, 16000, num_classes=100)["head"] == 49 * 256 * (32 + 100)


def allocate():
    return torch.ones(32 * 2**20).sum()  # 128 MiB of float32


def test_peak_memory_of_a_known_allocation():
    _, extra = peak_memory_mb(allocate)
    assert extra == pytest.approx(128, rel=0.15)
    _, after = peak_memory_mb(lambda: torch.ones(2**18).sum())
    assert after < 32, "the earlier, larger call must not be seen again"


def test_peak_memory_without_the_kernels_mark():
    resting = _peak_by_sampling(lambda: None)
    assert (_peak_by_sampling(allocate) - resting) / 2**20 > 60


def test_stage_writes_tables_and_figures(tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "conv_layers: [[8, 10, 5], [8, 3, 2], [8, 3, 2], [8, 3, 2], [8, 3, 2], [8, 2, 2], [8, 2, 2]]\n"
        "embed_dim: 16\nnum_layers: 1\nstate_size: 2\nposition: none\n"
    )
    models = open_models([], [str(config)])
    run_efficiency(models, [1.0, 0.5], repeats=2, out_dir=tmp_path / "out", device="cpu")
    rows = list(csv.DictReader(open(tmp_path / "out/efficiency.csv")))
    assert [(row["model"], float(row["audio_seconds"])) for row in rows] == [("tiny", 0.5), ("tiny", 1.0)]
    for row in rows:
        assert float(row["wall_min"]) <= float(row["wall_median"]) <= float(row["wall_max"])
        assert float(row["rtf"]) == pytest.approx(float(row["wall_median"]) / float(row["audio_seconds"]), rel=1e-4)
        parts = [
            p for p in csv.DictReader(open(tmp_path / "out/macs.csv")) if p["audio_seconds"] == row["audio_seconds"]
        ]
        assert sum(int(p["macs_per_second"]) for p in parts) == pytest.approx(int(row["macs_per_second"]), abs=10)
    for name in ("efficiency.svg", "efficiency.png", "macs.svg", "macs.png", "efficiency.json"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    with pytest.raises(ValueError, match="0.025 s"):
        run_efficiency(models, [0.01], 1, tmp_path / "out", "cpu")
    with pytest.raises(ValueError, match="no model to measure"):
        open_models([], [])
    with pytest.raises(ValueError, match="two models are called 'tiny'"):
        open_models([], [str(config), str(config)])
