"""Sizes by formula against built models and docs/papers.md 4; streaming state against real tensors; matching."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from espnet_mamba.bin import model_info as command
from espnet_mamba.bin.cli import run_main
from espnet_mamba.efficiency.macs import macs_per_second
from espnet_mamba.efficiency.model_info import CROP_SECONDS, REPORTED, match, match_all, model_report, model_size
from espnet_mamba.layers.block import MIXERS
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.models.sizing import (
    MIXER_PARAMETERS,
    check_sizes,
    count_parameters,
    counted_parameters,
    receptive_field,
    stream_state,
    width_step,
)

MODELS = Path(__file__).resolve().parents[1] / "conf" / "models"
NAMES = sorted(path.stem for path in MODELS.glob("*.yaml"))

# docs/papers.md 4: millions of parameters that the papers' settings give, with a head of 504 classes.
COMPUTED = {
    "transformer_base": 94.70,
    "causal_transformer_base_paper": 94.70,
    "mamba_base_paper": 78.20,
    "mamba_mlp_base_paper": 94.75,
    "extbimamba_base": 146.74,
    "extbimamba_mlp_base": 203.43,
    "innbimamba_base": 82.90,
    "innbimamba_mlp_base": 94.73,
    "transformer_small": 22.38,
    "causal_transformer_small_paper": 22.38,
    "mamba_small_paper": 23.50,
    "mamba_mlp_small_paper": 32.96,
    "extbimamba_small": 41.18,
    "extbimamba_mlp_small": 50.64,
    "mamba2_small": 22.16,
}
# The same section's variants of them.
COMPUTED_VARIANTS = [
    ("mamba_mlp_base_paper", {"ffn_dim": 0}, 78.20),
    ("extbimamba_base", {"num_layers": 6}, 78.19),
    ("extbimamba_small", {"num_layers": 6}, 23.49),
    ("innbimamba_base", {"share_conv": False}, 83.04),
    ("innbimamba_mlp_base", {"share_conv": False}, 94.87),
]
TINY = HubertConfig(
    name="test",
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (12, 2, 2), (16, 2, 2)),
    embed_dim=32,
    num_layers=2,
    state_size=4,
    expand=2,
    position_kernel=8,
    position_groups=4,
)
CAUSAL = replace(TINY, mixer="mamba", front_end="conv_layer", position="causal_conv")
VARIANTS = [
    replace(TINY, join="concat_linear", norm="pre", position="none"),
    replace(TINY, mixer="innbimamba", share_conv=False, join="mean", ffn_dim=40),
    replace(TINY, mixer="mamba2", head_dim=8, front_end="conv_layer", norm="pre", ffn_dim=40),
    replace(TINY, mixer="attention", num_heads=4),
    replace(TINY, mixer="attention", num_heads=4, block="macaron", ffn_dim=40),
    replace(TINY, mixer="mamba2", head_dim=8, block="macaron", ffn_dim=40, norm="pre"),
    replace(TINY, embed_dim=40, mixer="mamba"),  # the rank of dt is rounded up
]


def load(name):
    return load_config(MODELS / f"{name}.yaml")


def build(config, num_classes=504):
    with torch.device("meta"):
        return HubertForPretraining(config, num_classes)


def millions(config):
    return model_size(config, "params") / 1e6


@pytest.mark.parametrize("name", NAMES)
def test_formula_is_what_every_shipped_model_has(name):
    model = build(load(name))
    formula = count_parameters(load(name), 504)
    assert formula == counted_parameters(model)
    assert sum(formula.values()) == sum(p.numel() for p in model.parameters())
    assert {part: n for part, n in formula.items() if part != "head"} == count_parameters(load(name))


@pytest.mark.parametrize("config", VARIANTS, ids=lambda c: f"{c.block}-{c.mixer}-{c.norm}-{c.position}")
def test_formula_holds_for_every_option(config):
    assert count_parameters(config, 7) == counted_parameters(build(config, 7))


def test_sizes_are_those_of_the_papers_settings():
    for name, expected in COMPUTED.items():
        assert millions(load(name)) == pytest.approx(expected, abs=0.01), name
    for name, changes, expected in COMPUTED_VARIANTS:
        assert millions(replace(load(name), **changes)) == pytest.approx(expected, abs=0.01), (name, changes)
    conbimamba = load("conbimamba_base")
    assert millions(conbimamba) == pytest.approx(249.3, abs=0.05)
    one_less = replace(conbimamba, num_layers=11)
    assert millions(conbimamba) - millions(one_less) == pytest.approx(19.97, abs=0.01)
    assert REPORTED.keys() <= set(NAMES)


def test_every_mixer_has_a_formula_and_every_parameter_a_part():
    assert MIXER_PARAMETERS.keys() == MIXERS.keys()
    model = HubertModel(TINY)
    model.blocks[0].mixer.gadget = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'blocks\.0\.mixer\.gadget\.weight' belongs to no part"):
        counted_parameters(model)


def tensors_bytes(states):
    return sum(tensor.numel() * tensor.element_size() for state in states for tensor in state)


@pytest.mark.parametrize("name", [n for n in NAMES if stream_state(load(n)) is not None])
def test_state_is_what_start_state_returns(name):
    config = load(name)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        with torch.device("meta"):
            blocks = HubertModel(config).to(dtype).blocks
        fixed = stream_state(config, size).fixed
        expected = tensors_bytes(block.mixer.start_state(1) for block in blocks)
        assert fixed.get("conv", 0) + fixed.get("scan", 0) == expected
        assert fixed["position"] == (config.position_kernel - 1) * config.embed_dim * size


def test_attention_keeps_a_second_of_keys_and_values_per_second():
    config = load("causal_transformer_tiny")
    state = stream_state(config)
    model = HubertModel(config).eval()
    caches = [block.mixer.start_state(1) for block in model.blocks]
    with torch.no_grad():
        caches = [b(torch.zeros(1, 100, 128), None, s)[1] for b, s in zip(model.blocks, caches, strict=True)]
    assert tensors_bytes(caches) == 2 * sum(state.growing.values())  # 100 frames are 2 s
    assert state.num_bytes(2.0) == sum(state.fixed.values()) + tensors_bytes(caches)
    assert not stream_state(load("mamba_tiny")).growing


def test_front_end_streams_with_the_inputs_that_are_counted():
    """Frame by frame, each convolution keeping what its next output needs again: equal to the whole, and that big."""
    front_end = HubertModel(CAUSAL).front_end.eval()
    wavs = torch.randn(1, 400 + 9 * 320)
    kept, frames = [wavs.new_zeros(1, width, 0) for width in (1, 8, 8, 8, 8, 8, 12)], []
    with torch.no_grad():
        for start, stop in zip([0, *range(400, 3280, 320)], range(400, 3281, 320), strict=True):
            x = wavs[:, None, start:stop]
            for i, (conv, norm, layer) in enumerate(
                zip(front_end.convs, front_end.norms, CAUSAL.conv_layers, strict=True)
            ):
                x = torch.cat([kept[i], x], 2)
                y = conv(x)
                kept[i], x = x[:, :, y.shape[2] * layer[2] :], F.gelu(norm(y))
            frames.append(x)
        whole = front_end(wavs)
    torch.testing.assert_close(torch.cat(frames, 2).transpose(1, 2), whole, rtol=1e-4, atol=1e-5)
    assert tensors_bytes([kept]) == stream_state(CAUSAL).fixed["front_end"]


@pytest.mark.parametrize("position", ["causal_conv", "conv", "none"])
def test_receptive_field_is_where_the_gradient_is(position):
    config = replace(CAUSAL, position=position)
    model = HubertModel(config).eval()
    wavs = (torch.randn(1, 9000) * 0.1).requires_grad_()
    model(wavs).hidden_states[0][0, 12].square().sum().backward()
    touched = wavs.grad[0].nonzero().flatten()
    field = receptive_field(config)
    assert field.front_end == 400 and len(touched) == field.positions == int(touched[-1] - touched[0]) + 1
    assert field.positions == 400 + 320 * (0 if position == "none" else 7)
    state = stream_state(config)
    assert state.fixed.get("position", 0) == (0 if position == "none" else 7 * 32 * 4)


def test_receptive_field_of_whole_utterances():
    assert receptive_field(load("mamba_base")).positions == 400 + 127 * 320
    assert str(receptive_field(load("mamba_base"))).endswith(
        "41040 samples (2565 ms) with positions, then all of the past"
    )
    assert receptive_field(load("mamba_base_paper")).positions is None
    both = receptive_field(replace(CAUSAL, block="macaron", ffn_dim=8))
    assert both.mixers == "then the whole utterance, both directions of time"
    for name in ("mamba_base_paper", "transformer_base", "conbimamba_base"):
        assert stream_state(load(name)) is None


@pytest.mark.parametrize("by", ["params", "macs"])
@pytest.mark.parametrize(
    ("vary", "config", "changes"),
    [
        ("width", load("transformer_base"), {"embed_dim": 480, "ffn_dim": 1920}),
        ("width", load("extbimamba_base"), {"embed_dim": 1040}),
        ("width", load("mamba2_small"), {"embed_dim": 112}),
        ("depth", load("conbimamba_base"), {"num_layers": 5}),
        ("expand", load("mamba_base"), {"expand": 7}),
        ("expand", replace(CAUSAL, mixer="mamba2", head_dim=48, embed_dim=32), {"expand": 6}),
    ],
)
def test_match_finds_a_planted_answer(by, vary, config, changes):
    target = replace(config, name="planted", **changes)
    found = match(config, target, by, vary)
    assert found.changes == changes and found.gap == 0
    assert found.config == replace(target, name=f"{config.name}_matched")


def test_match_reports_the_gap_of_the_nearest():
    config, target = load("extbimamba_base"), load("transformer_base")
    found = match(config, target, "params", "width")
    assert found.gap == pytest.approx(millions(found.config) / millions(target) - 1)
    for width in (found.changes["embed_dim"] - 16, found.changes["embed_dim"] + 16):
        assert abs(millions(replace(config, embed_dim=width)) / millions(target) - 1) > abs(found.gap)
    least = match(config, load("mamba_tiny"), "params", "depth")
    assert least.changes == {"num_layers": 1} and least.gap > 1  # the front end alone is larger
    by_macs = match_all([config], target, "macs", None, [5.0, 320.0])
    assert [(m.varied, m.seconds) for m in by_macs] == [(v, s) for v in ("width", "depth", "expand") for s in (5, 320)]
    assert by_macs[0].changes["embed_dim"] < by_macs[1].changes["embed_dim"]  # attention grows with the length


@pytest.mark.parametrize("name", ["extbimamba_base", "conbimamba_base"])
def test_shipped_matched_models_are_as_large_as_the_transformer(name):
    shipped, target = load(f"{name}_matched"), load("transformer_base")
    assert millions(shipped) == pytest.approx(millions(target), rel=0.01)
    assert shipped == match(load(name), target, "params", "width").config
    assert shipped.num_layers == target.num_layers == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mixer": "attention", "num_heads": 5},
            "num_heads: 5 does not divide the width, 32; widths are multiples of 20",
        ),
        ({"position_groups": 5}, "position_groups: 5 does not divide the width, 32"),
        ({"mixer": "mamba2", "head_dim": 48}, "head_dim: 48 does not divide the width, 32; widths are multiples of 24"),
        ({"expand": 1.87}, "expand: 1.87 is not a whole number of at least 1"),
        ({"num_layers": 0}, "num_layers: 0 is not a whole number of at least 1"),
        ({"ffn_dim": -1}, "ffn_dim: -1 is not a whole number of at least 0"),
        ({"block": "macaron"}, "ffn_dim: 0 is not a whole number of at least 1"),
        ({"mixer": "extbimanba"}, "mixer: 'extbimanba' is not one of: .*; did you mean 'extbimamba'?"),
        ({"block": "macarons"}, "did you mean 'macaron'?"),
        ({"front_end": "group"}, "front_end: 'group' is not one of: conv_group conv_layer; did you mean 'conv_group'?"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(changes, message):
    config = replace(TINY, **changes)
    for function in (check_sizes, count_parameters, receptive_field, stream_state):
        with pytest.raises(ValueError, match=message) as caught:
            function(config)
        assert "\n" not in str(caught.value)


def test_widths_are_multiples_of_what_must_divide_them():
    assert width_step(load("transformer_base")) == 48 and width_step(load("extbimamba_base")) == 16
    assert width_step(replace(CAUSAL, mixer="mamba2", head_dim=48, expand=3)) == 16
    assert width_step(replace(CAUSAL, position="none")) == 1


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["model_info", *map(str, words)])
        status = 0
        try:
            run_main(command.main)
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out if status == 0 else printed.err

    return call


def test_all_is_one_table_of_every_config_and_the_docs_hold_it(run, root):
    status, table = run("--all")
    assert status == 0 and re.findall(r"^\| `(\w+)` \|", table, flags=re.M) == NAMES
    assert table in (root / "docs/models.md").read_text(), "paste what --all prints into docs/models.md"
    row = next(line for line in table.splitlines() if line.startswith("| `extbimamba_base` |"))
    assert row.startswith("| `extbimamba_base` | 146.74 | 94.3 |") and "unbounded" in row


def test_docs_give_the_gaps_that_match_finds(run, root):
    _, table = run("--config", "extbimamba_base", "conbimamba_base", "--match", "transformer_base")
    assert table in (root / "docs/models.md").read_text(), "paste what --match prints into docs/models.md"


def test_one_model_in_full(run):
    config = load("mamba_tiny")
    status, text = run("--config", MODELS / "mamba_tiny.yaml", "--seconds", 2)
    assert status == 0 and text == model_report(config, [2.0]) + "\n"
    parts = re.findall(r"^\| (\w+) \| ([\d,]+) \| ([\d,]+) \| (\S+) \|$", text, flags=re.M)
    assert all(formula == counted for _, formula, counted, _ in parts)
    assert parts[-1][:2] == ("all", f"{sum(count_parameters(config, 504).values()):,}")
    assert float(parts[-1][3]) == pytest.approx(sum(macs_per_second(config, 2.0).values()) / 1e9, abs=1e-4)
    assert "look-ahead: 0 ms" in text and "receptive field: 400 samples (25 ms)" in text
    assert "front_end 1,044 bytes, position 15,872 bytes, conv 18,432 bytes, scan 49,152 bytes" in text
    assert "| head |" not in run("--config", "mamba_tiny", "--num_classes", 0)[1]


def test_match_by_macs_is_at_the_longest_crop_unless_told(run):
    _, text = run("--config", "mamba_tiny", "--match", "transformer_tiny", "--by", "macs", "--vary", "depth")
    assert f"GMAC/s at {CROP_SECONDS:g} s" in text and "num_layers: " in text and "`transformer_tiny`" in text


def test_what_a_user_can_mend_is_one_line(run, tmp_path):
    (tmp_path / "odd.yaml").write_text("mixer: attention\nnum_heads: 5\n")
    for words, message in (
        (["--config", "exbimamba_tiny"], "did you mean 'extbimamba_tiny'?"),
        (["--config", "mamba_tiny", "--match", "transformer_bas"], "did you mean 'transformer_base'?"),
        (["--config", "transformer_tiny", "--match", "mamba_tiny", "--vary", "expand"], "'attention' has no expand"),
        (["--config", tmp_path / "odd.yaml"], "num_heads: 5 does not divide the width, 768"),
        (["--config", "mamba_tiny", "--seconds", 0.01], "160 samples are shorter than one frame (400 samples)"),
        (["--config", "mamba_tiny", "--num_classes", -1], "num_classes: -1 is below 0"),
        (["--all", "--models_dir", tmp_path / "none"], "no model"),
        ([], "no model; give --all, or --config"),
    ):
        status, error = run(*words)
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    config = load("mamba_tiny")
    with pytest.raises(ValueError, match="by: 'parms' is not one of: params macs; did you mean 'params'?"):
        match(config, config, by="parms")
    with pytest.raises(ValueError, match="vary: 'widht' is not one of: width depth expand; did you mean 'width'?"):
        match(config, config, vary="widht")


def test_help_is_quick_and_complete(root):
    words = [sys.executable, "-m", "espnet_mamba.bin.model_info", "--help"]
    text = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
    for option in ("--config", "--all", "--match", "--by", "--vary", "--seconds", "--num_classes"):
        assert option in text
