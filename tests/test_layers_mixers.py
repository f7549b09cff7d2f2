"""One body of tests for every mixer of the table: a new mixer is tested by being in it."""

import pytest
import torch

from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.block import MIXERS, EncoderBlock, MacaronBlock, build_mixer
from espnet_mamba.layers.innbimamba import InnBiMamba
from espnet_mamba.layers.mamba import Mamba

WIDTH = 16
CAUSAL = [name for name, kind in MIXERS.items() if kind.causal]


# mixer, its options, the type: float64 runs the plain scan, float32 the compiled kernels where there are any
SMALL = {"state_size": 4, "num_heads": 4, "head_dim": 8, "attention_dropout": 0.0}
BUILDS = [(name, {}) for name in MIXERS]
BUILDS += [("extbimamba", {"join": "concat_linear"}), ("innbimamba", {"share_conv": False, "join": "mean"})]


@pytest.fixture(params=[(*build, dtype) for build in BUILDS for dtype in (torch.float64, torch.float32)], ids=str)
def mixer(request):
    name, options, dtype = request.param
    return build(name, **options).to(dtype)


def build(name, **options):
    own = {option: value for option, value in SMALL.items() if option in MIXERS[name].options}
    return build_mixer(name, WIDTH, own | options)


def like(mixer, *shape, **options):
    return torch.randn(*shape, dtype=next(mixer.parameters()).dtype, **options)


def test_shape_and_gradients_of_all_parameters(mixer):
    x = like(mixer, 2, 21, WIDTH, requires_grad=True)
    y, state = mixer(x)
    assert y.shape == x.shape and state is None
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_padding_and_batch_order_change_nothing(mixer):
    lengths = torch.tensor([21, 9, 1])
    x = like(mixer, 3, 21, WIDTH)
    x[1, 9:] = float("nan")
    together, _ = mixer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = mixer(x[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-6)
        assert (together[row, length:] == 0).all()
    swapped, _ = mixer(x[[2, 0, 1]], lengths[[2, 0, 1]])
    torch.testing.assert_close(swapped, together[[2, 0, 1]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_path_is_the_one_with_state(name, dtype):
    mixer = build(name).to(dtype)
    x, lengths = like(mixer, 2, 30, WIDTH), None if "attention" in name else torch.tensor([30, 11])
    fused, none = mixer(x, lengths)
    stepped, state = mixer(x, lengths, mixer.start_state(2))
    assert none is None and state is not None
    torch.testing.assert_close(fused, stepped, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(MIXERS))
def test_causality_is_as_the_table_says(name):
    mixer = build(name).double()
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1.0
    same = torch.equal(mixer(x)[0][:, :12], mixer(changed)[0][:, :12])
    assert same == MIXERS[name].causal


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cuts", [[1, 2, 3], [7], list(range(1, 30))])
def test_chunks_equal_the_whole(name, cuts):
    mixer = build(name)
    x = torch.randn(2, 30, WIDTH)
    state, parts = mixer.start_state(2), []
    for begin, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        y, state = mixer(x[:, begin:stop], state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x)[0], rtol=1e-4, atol=1e-6)


def mirrored(mixer, pairs):
    """A mixer of the same kind whose directions have changed places."""
    weights = mixer.state_dict()
    swapped = {}
    for name, value in weights.items():
        for one, other in pairs:
            if name.startswith(one):
                name = other + name[len(one) :]
                break
            if name.startswith(other):
                name = one + name[len(other) :]
                break
        swapped[name] = value
    return swapped


def test_parameters_bear_the_names_of_mamba_ssm_and_of_vision_mamba():
    mamba = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    mamba |= {"A_log", "D", "out_proj.weight"}
    assert set(Mamba(WIDTH).state_dict()) == mamba
    second = {"conv1d_b.weight", "conv1d_b.bias", "x_proj_b.weight", "dt_proj_b.weight", "dt_proj_b.bias"}
    assert set(InnBiMamba(WIDTH, share_conv=False).state_dict()) == mamba | second | {"A_b_log", "D_b"}


def test_swapped_directions_mirror_the_output():
    for kind, options, pairs in (
        (ExtBiMamba, {}, [("forward_mamba.", "backward_mamba.")]),
        (
            InnBiMamba,
            {"share_conv": False},
            [("conv1d.", "conv1d_b."), ("x_proj.", "x_proj_b."), ("dt_proj.", "dt_proj_b."), ("A_log", "A_b_log")]
            + [("D_b", "D")],
        ),
    ):
        mixer, mirror = (kind(WIDTH, state_size=4, **options).double() for _ in range(2))
        with torch.no_grad():
            for parameter in mixer.parameters():  # A and D start equal in both directions
                parameter.add_(torch.randn_like(parameter) * 0.1)
        mirror.load_state_dict(mirrored(mixer, pairs))
        x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
        torch.testing.assert_close(mirror(x.flip(1))[0].flip(1), mixer(x)[0])


def test_innbimamba_by_parts():
    """Against two plain Mambas that share in_proj and out_proj, glued by flips."""
    mixer = InnBiMamba(WIDTH, state_size=4, share_conv=False).double()
    weights = mixer.state_dict()
    parts = []
    for suffix in ("", "_b"):
        one = Mamba(WIDTH, state_size=4).double()
        names = {"A_log": "A_b_log", "D": "D_b"} if suffix else {}
        own = {}
        for name in one.state_dict():
            head = name.split(".")[0]
            shared = head in ("in_proj", "out_proj")
            own[name] = weights[name if shared else names.get(name, name.replace(head, head + suffix))]
        one.load_state_dict(own)
        parts.append(one)
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    expected = parts[0](x)[0] + parts[1](x.flip(1))[0].flip(1)
    torch.testing.assert_close(mixer(x)[0], expected)


@pytest.mark.parametrize(("share_conv", "millions"), [(True, 82.90), (False, 83.04)])
def test_innbimamba_base_has_paper_2s_size(share_conv, millions):
    """12 layers of width 768, expand 3, 24 states, beside 9.643 M outside the layers (docs/papers.md 4)."""
    mixer = InnBiMamba(768, state_size=24, expand=3, share_conv=share_conv)
    norm = 2 * 768
    layers = 12 * (sum(p.numel() for p in mixer.parameters()) + norm)
    assert (layers + 9.643e6) / 1e6 == pytest.approx(millions, abs=0.02)


def test_concat_join_leaves_the_padding_empty():
    mixer = ExtBiMamba(WIDTH, state_size=4, join="concat_linear")
    y, _ = mixer(torch.randn(2, 9, WIDTH), torch.tensor([9, 4]))
    assert (y[1, 4:] == 0).all() and y[1, :4].abs().min() > 0


def test_dt_starts_between_1e3_and_01_or_at_0693():
    steps = torch.nn.functional.softplus(Mamba(64).dt_proj.bias)
    assert 1e-3 * 0.99 <= steps.min() and steps.max() <= 0.1 * 1.01
    assert torch.all(Mamba(64, dt_init="bert_reset").dt_proj.bias == 0)  # softplus(0) = 0.693, the papers' accident
    with pytest.raises(ValueError, match="dt_init"):
        Mamba(64, dt_init="other")


def test_macaron_block_keeps_padding_apart_and_counts_only_valid_frames():
    block = MacaronBlock(
        WIDTH, "extbimamba", {"state_size": 4, "join": "concat_linear"}, 32, conv_kernel=5, dropout=0.0
    )
    x, lengths = torch.randn(2, 12, WIDTH), torch.tensor([12, 5])
    x[1, 5:] = 1e3
    block.train()(x, lengths)
    statistics = {name: value.clone() for name, value in block.conv.norm.state_dict().items()}
    block.conv.norm.reset_running_stats()
    x[1, 5:] = -7.0
    block(x, lengths)
    for name, value in block.conv.norm.state_dict().items():
        torch.testing.assert_close(value, statistics[name])
    block.eval()
    torch.testing.assert_close(block(x, lengths)[0][1, :5], block(x[1:, :5])[0][0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="cannot run in chunks"):
        block(x, state=())


def test_mamba2_is_mamba1_with_a_heads_channels_alike():
    """One head of the whole width, checked frame by frame against Mamba-2's recurrence."""
    mixer = build("mamba2", head_dim=2 * WIDTH).double()
    x = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    z, xBC, dt = mixer.in_proj(x).split(mixer.splits, dim=-1)
    context = torch.cat([torch.zeros(1, 3, xBC.shape[2], dtype=torch.float64), xBC], 1)
    taps = mixer.conv1d.weight.squeeze(1)
    state, outputs = torch.zeros(2 * WIDTH, 4, dtype=torch.float64), []
    for t in range(9):
        now = torch.nn.functional.silu((context[0, t : t + 4].T * taps).sum(1) + mixer.conv1d.bias)
        u, b, c = now.split([2 * WIDTH, 4, 4])
        step = torch.nn.functional.softplus(dt[0, t, 0] + mixer.dt_bias[0])
        state = torch.exp(-step * mixer.A_log[0].exp()) * state + step * u[:, None] * b[None]
        y = (state @ c + mixer.D[0] * u) * torch.nn.functional.silu(z[0, t])
        outputs.append(y * torch.rsqrt(y.square().mean() + 1e-5) * mixer.norm.weight)
    torch.testing.assert_close(mixer(x)[0][0], mixer.out_proj(torch.stack(outputs)))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_block_with_feed_forward_keeps_padding_apart(norm):
    block = EncoderBlock(WIDTH, "extbimamba", {"state_size": 4}, ffn_dim=32, norm=norm).eval()
    x, lengths = torch.randn(2, 12, WIDTH), torch.tensor([12, 5])
    torch.testing.assert_close(block(x, lengths)[0][1, :5], block(x[1:, :5])[0][0], rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'mambba' is not one of: mamba extbimamba innbimamba mamba2"):
        EncoderBlock(WIDTH, "mambba", {})
    with pytest.raises(ValueError, match="cannot run in chunks"):
        ExtBiMamba(WIDTH)(torch.randn(1, 4, WIDTH), state=())
    with pytest.raises(ValueError, match="5 heads do not divide the width, 16"):
        build("attention", num_heads=5)
    with pytest.raises(ValueError, match="does not divide the inner width, 32"):
        build("mamba2", head_dim=5)
    with pytest.raises(ValueError, match="'concat_linear' is not one of: sum mean"):
        InnBiMamba(WIDTH, join="concat_linear")
