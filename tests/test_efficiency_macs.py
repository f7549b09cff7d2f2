"""MACs by formula, part by part, against a run that counts every multiplication and against PyTorch's counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchaudio
from naive_macs import NaiveRun

from espnet_mamba.efficiency.flop_counting import FORMULAS, count_flops, operators, total_flops
from espnet_mamba.efficiency.macs import (
    FLOP_PER_MAC,
    MIXER_MACS,
    SCAN_MACS,
    count_macs,
    count_macs_of,
    count_ssamba_macs,
    macs_per_second,
)
from espnet_mamba.efficiency.macs_table import macs_table, open_config
from espnet_mamba.layers.block import MIXERS
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.pretraining import CosineHead
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.config import load_config as load_ssamba_config
from espnet_mamba.models.ssamba.model import SsambaModel
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining
from espnet_mamba.ops.selection import FORCE

TINY = HubertConfig(
    name="tiny",
    conv_layers=((4, 10, 5), (4, 3, 2), (4, 3, 2), (4, 3, 2), (4, 3, 2), (4, 2, 2), (6, 2, 2)),
    embed_dim=8,
    num_layers=2,
    state_size=3,
    expand=2,
    head_dim=4,
    num_heads=2,
    position_kernel=4,
    position_groups=2,
)
VARIANTS = {
    "mamba": replace(TINY, mixer="mamba", position="causal_conv", front_end="conv_layer"),
    "mamba, no position, feed-forward, pre-norm": replace(TINY, mixer="mamba", position="none", ffn_dim=5, norm="pre"),
    "extbimamba": TINY,
    "extbimamba, concat_linear": replace(TINY, join="concat_linear", conv_kernel=2),
    "innbimamba": replace(TINY, mixer="innbimamba"),
    "innbimamba, two convolutions": replace(TINY, mixer="innbimamba", share_conv=False, join="mean"),
    "mamba2": replace(TINY, mixer="mamba2"),
    "attention": replace(TINY, mixer="attention", ffn_dim=5),
    "causal attention": replace(TINY, mixer="causal_attention", ffn_dim=5),
    "conbimamba": replace(TINY, block="macaron", join="concat_linear", ffn_dim=5, conv_module_kernel=3),
}
SSAMBA = SsambaConfig(
    embed_dim=8,
    depth=2,
    state_size=3,
    num_mel_bins=16,
    num_frames=32,
    patch_size=(8, 8),
    mask_patches=4,
    mask_squares=(1, 2),
    mask_passes=1,
)
SHARED = {"share_conv": replace(SSAMBA, share_conv=True, residual="single"), "two convolutions": SSAMBA}
BASES = "causal_transformer extbimamba extbimamba_mlp innbimamba mamba mamba_mlp mamba2 conbimamba transformer".split()


def merged(parts):
    """The counter cannot tell dt_proj from x_proj."""
    both = {name: parts[name] for name in ("x_proj", "dt_proj") if name in parts}
    return {name: macs for name, macs in parts.items() if name not in both} | (
        {"x_proj": sum(both.values())} if both else {}
    )


def counted(model, *inputs):
    return {part: flops / FLOP_PER_MAC for part, flops in count_flops(model, *inputs).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_formula_is_the_number_of_multiplications_of_a_naive_run(name):
    config = VARIANTS[name]
    model, wav = HubertModel(config).eval(), torch.randn(400 + 3 * 320 + 17)
    run = NaiveRun()
    output = run.hubert(model, wav)
    with torch.no_grad():
        expected = model(wav[None]).hidden_states[-1][0]
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)  # it is the model that was counted
    assert dict(run.macs) == count_macs(config, len(wav))


@pytest.mark.parametrize("name", SHARED)
def test_ssamba_formula_is_the_number_of_multiplications_of_a_naive_run(name):
    model, wav = SsambaModel(SHARED[name]).eval(), torch.randn(4000)
    run = NaiveRun()
    output = run.ssamba(model, wav)
    with torch.no_grad():
        expected = model(wav[None]).output[0]
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=0)
    parts = count_ssamba_macs(SHARED[name], len(wav))
    assert parts.pop("front_end") == 23 * 257 * 16, "23 frames; the filterbanks are the model's own in the naive run"
    assert dict(run.macs) == parts


def test_what_the_scan_leaves_out_is_what_the_docstring_says():
    run = NaiveRun()
    run.hubert(HubertModel(VARIANTS["extbimamba"]).eval(), torch.randn(400 + 3 * 320))
    once = 2 * 2 * 4 * 16  # layers, directions, frames, channels
    assert run.macs["scan"] == SCAN_MACS * once * 3 == 3 * once * 3
    assert run.excluded == {"dt A": once * 3, "exp": once * 3, "dt x": once, "D x": once}


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_formula_agrees_with_pytorchs_counter_part_by_part(name, backend, monkeypatch):
    monkeypatch.setenv(FORCE, backend)
    config = VARIANTS[name]
    num_samples = {"reference": 400, "torch": 23457, "auto": 16000}[backend]
    model, wav = HubertModel(config).eval(), torch.randn(1, num_samples)
    assert counted(model, wav) == merged(count_macs(config, num_samples))


@pytest.mark.parametrize("family", BASES)
def test_formula_agrees_with_the_counter_at_full_size(family, root):
    """On the meta device: nothing is computed, every shape is the real one. Two blocks: they are alike."""
    config = replace(load_config(root / f"conf/models/{family}_base.yaml"), num_layers=2)
    with torch.device("meta"):
        model, wav = HubertModel(config).eval(), torch.empty(1, 16000 * 40)
    assert counted(model, wav) == merged(count_macs(config, 16000 * 40))


def test_transformer_base_costs_what_torchaudios_hubert_base_costs(root):
    """Another's code of the same model; its position convolution makes one frame more and throws it away."""
    config = load_config(root / "conf/models/transformer_base.yaml")
    with torch.device("meta"):
        model, wav = torchaudio.models.hubert_base().eval(), torch.empty(1, 160000)
    one_frame = 768 * (768 // 16) * 128
    assert total_flops(lambda: model(wav), wav) == FLOP_PER_MAC * (sum(count_macs(config, 160000).values()) + one_frame)


def test_ssamba_formula_agrees_with_the_counter(root):
    config = load_ssamba_config(root / "conf/ssamba/ssamba_mini.yaml")
    model, wav = SsambaModel(config).eval(), torch.randn(1, 33333)
    parts = count_ssamba_macs(config, 33333)
    seen = counted(model, wav)
    assert seen.pop("SsambaModel") == parts.pop("front_end")  # the mel filters stand outside every module
    assert seen == merged(parts)
    assert macs_per_second(config, 2.0) == {k: v / 2 for k, v in count_macs_of(config, 32000).items()}


def test_heads_agree_with_the_counter():
    head, hidden = CosineHead(8, num_classes=7), torch.randn(49, 8)
    assert sum(counted(head, hidden).values()) == count_macs(TINY, 16000, num_classes=7)["head"]
    model, wav = SsambaForPretraining(SSAMBA).eval(), torch.randn(1, 16000)
    parts = count_ssamba_macs(SSAMBA, 16000, heads=True)
    assert sum(counted(model, wav).values()) == sum(parts.values())
    assert "head" not in count_ssamba_macs(SSAMBA, 16000)


def test_counting_changes_no_output_and_leaves_nothing_behind():
    model, wav = HubertModel(TINY).eval(), torch.randn(1, 8000)
    with torch.no_grad():
        before = model(wav).hidden_states[-1]
        with operators():
            inside = model(wav).hidden_states[-1]
    assert torch.equal(before, inside)
    output = model(wav).hidden_states[-1]
    output.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters()), "operators() has no backward pass"
    flops = total_flops(lambda: model(wav), wav)
    assert flops == FLOP_PER_MAC * sum(count_macs(TINY, 8000).values())
    assert total_flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == FLOP_PER_MAC * 60
    assert len(FORMULAS) == 3


def test_a_wrong_formula_would_be_seen(monkeypatch):
    monkeypatch.setitem(MIXER_MACS, "extbimamba", MIXER_MACS["mamba"])
    model, wav = HubertModel(TINY).eval(), torch.randn(1, 16000)
    assert counted(model, wav) != merged(count_macs(TINY, 16000))
    assert MIXER_MACS.keys() == MIXERS.keys()


@pytest.mark.parametrize(("model", "seconds", "expected"), [
    ("mamba_base_paper", (5, 10, 20, 40, 80, 160, 320), (6.18, 6.19, 6.20, 6.20, 6.20, 6.20, 6.20)),
    ("transformer_base", (5, 10, 20, 40, 80, 160, 320), (7.17, 7.41, 7.87, 8.80, 10.64, 14.33, 21.70)),
])  # fmt: skip
def test_mamba_is_flat_and_the_transformer_rises(model, seconds, expected, root):
    """docs/papers.md 8: GMAC per second of audio at the lengths of paper 2's figure."""
    config = load_config(root / f"conf/models/{model}.yaml")
    for length, giga in zip(seconds, expected, strict=True):
        assert sum(macs_per_second(config, length).values()) / 1e9 == pytest.approx(giga, abs=0.0051), length


def test_the_table_holds_every_part_of_both_kinds_at_every_length(root):
    paths = (root / "conf/models/mamba_tiny.yaml", root / "conf/ssamba/ssamba_mini.yaml")
    configs = [open_config(path) for path in paths]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in macs_table(configs, [5, 320]).splitlines()]
    assert table[0] == ["model", "part", "at 5 s", "at 320 s"]
    for config in configs:
        rows = {row[1]: [float(value) for value in row[2:]] for row in table if row[0] == f"`{config.name}`"}
        sums, flops = rows.pop("all, GMAC/s"), rows.pop("all, GFLOP/s")
        assert rows.keys() == count_macs_of(config, 80000).keys()
        assert [sum(values) for values in zip(*rows.values(), strict=True)] == pytest.approx(sums, rel=1e-3)
        assert flops == pytest.approx([FLOP_PER_MAC * value for value in sums], rel=1e-3)
    with pytest.raises(FileNotFoundError, match="did you mean 'mamba_tiny'"):
        open_config(root / "conf/models/mamba_tinny.yaml")


@pytest.mark.parametrize(("mixer", "expected"), [("mamba", 6.20), ("extbimamba", 9.69)])
def test_base_models_cost_what_the_papers_sizes_give(mixer, expected):
    """docs/papers.md 8, GMAC per second of audio, analytic."""
    parts = macs_per_second(HubertConfig(mixer=mixer), 320.0)
    assert sum(parts.values()) / 1e9 == pytest.approx(expected, abs=0.006)
    assert (parts["front_end"] + parts["projection"] + parts["position"]) / 1e9 == pytest.approx(2.71, abs=0.01)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="399 samples are shorter than one frame"):
        count_macs(TINY, 399)
    with pytest.raises(ValueError, match="399 samples are shorter than one frame"):
        count_ssamba_macs(SSAMBA, 399)
    with pytest.raises(ValueError, match="mixer 'rnn' has no formula"):
        count_macs(replace(TINY, mixer="rnn"), 16000)


def test_head_is_counted_only_when_asked():
    assert "head" not in count_macs(TINY, 16000)
    assert count_macs(TINY, 16000, num_classes=100)["head"] == 49 * 256 * (8 + 100)
