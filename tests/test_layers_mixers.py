"""One body of tests for every mixer of the table: a new mixer is tested by being in it."""

import pytest
import torch

from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.block import MIXERS, EncoderBlock
from espnet_mamba.layers.mamba import Mamba
from espnet_mamba.ops.causal_conv1d import causal_conv1d

WIDTH = 16
CAUSAL = [name for name, (_, causal) in MIXERS.items() if causal]


@pytest.fixture(params=list(MIXERS))
def mixer(request):
    return MIXERS[request.param][0](WIDTH, state_size=4).double()


def test_shape_and_gradients_of_all_parameters(mixer):
    x = torch.randn(2, 21, WIDTH, dtype=torch.float64, requires_grad=True)
    y, state = mixer(x)
    assert y.shape == x.shape and state is None
    y.square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_padding_and_batch_order_change_nothing(mixer):
    lengths = torch.tensor([21, 9, 1])
    x = torch.randn(3, 21, WIDTH, dtype=torch.float64)
    together, _ = mixer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, _ = mixer(x[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0])
        assert (together[row, length:] == 0).all()
    swapped, _ = mixer(x[[2, 0, 1]], lengths[[2, 0, 1]])
    torch.testing.assert_close(swapped, together[[2, 0, 1]])


@pytest.mark.parametrize("name", list(MIXERS))
def test_causality_is_as_the_table_says(name):
    mixer = MIXERS[name][0](WIDTH, state_size=4).double()
    x = torch.randn(1, 30, WIDTH, dtype=torch.float64)
    changed = x.clone()
    changed[:, 12:] += 1.0
    same = torch.equal(mixer(x)[0][:, :12], mixer(changed)[0][:, :12])
    assert same == MIXERS[name][1]


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("cuts", [[1, 2, 3], [7], list(range(1, 30))])
def test_chunks_equal_the_whole(name, cuts):
    mixer = MIXERS[name][0](WIDTH, state_size=4)
    x = torch.randn(2, 30, WIDTH)
    state, parts = mixer.start_state(2), []
    for begin, stop in zip([0, *cuts], [*cuts, 30], strict=True):
        y, state = mixer(x[:, begin:stop], state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x)[0], rtol=1e-4, atol=1e-6)


def test_swapped_directions_mirror_the_output():
    mixer = ExtBiMamba(WIDTH, state_size=4).double()
    mirror = ExtBiMamba(WIDTH, state_size=4).double()
    mirror.forward_mamba.load_state_dict(mixer.backward_mamba.state_dict())
    mirror.backward_mamba.load_state_dict(mixer.forward_mamba.state_dict())
    x = torch.randn(2, 15, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(mirror(x.flip(1))[0].flip(1), mixer(x)[0])


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


def test_convolution_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    weight = torch.tensor([[0.5, 1.0]])  # last tap: the present
    silu = torch.nn.functional.silu
    forward = causal_conv1d(x, weight, lengths=torch.tensor([3]))[0, :, 0]
    torch.testing.assert_close(forward, torch.cat([silu(torch.tensor([1.0, 2.5, 4.0])), torch.zeros(1)]))
    backward = causal_conv1d(x, weight, lengths=torch.tensor([3]), reverse=True)[0, :, 0]
    torch.testing.assert_close(backward, torch.cat([silu(torch.tensor([2.0, 3.5, 3.0])), torch.zeros(1)]))


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_block_with_feed_forward_keeps_padding_apart(norm):
    block = EncoderBlock(WIDTH, "extbimamba", {"state_size": 4}, ffn_dim=32, norm=norm).eval()
    x, lengths = torch.randn(2, 12, WIDTH), torch.tensor([12, 5])
    torch.testing.assert_close(block(x, lengths)[0][1, :5], block(x[1:, :5])[0][0], rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'mambba' is not one of: mamba extbimamba"):
        EncoderBlock(WIDTH, "mambba", {})
    with pytest.raises(ValueError, match="cannot run in chunks"):
        ExtBiMamba(WIDTH)(torch.randn(1, 4, WIDTH), state=())
