"""The public convolution: by hand, and every backend that this machine runs against the plain one in float64."""

import pytest
import torch

from espnet_mamba.ops.causal_conv1d import backends, causal_conv1d
from espnet_mamba.ops.selection import relative_error

LIMITS = {"torch": (torch.float64, 1e-12)}
if not backends.unavailable("cpu"):
    LIMITS["cpu"] = (torch.float32, 5e-6)


def silu(*values):
    return torch.nn.functional.silu(torch.tensor(values))


def test_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    weight, lengths = torch.tensor([[0.5, 1.0]]), torch.tensor([3])  # last tap: the present
    padded = torch.zeros(1)
    forward = causal_conv1d(x, weight, lengths=lengths)[0, :, 0]
    torch.testing.assert_close(forward, torch.cat([silu(1.0, 2.5, 4.0), padded]))
    backward = causal_conv1d(x, weight, lengths=lengths, reverse=True)[0, :, 0]
    torch.testing.assert_close(backward, torch.cat([silu(2.0, 3.5, 3.0), padded]))


def test_state_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    weight, lengths, state = torch.tensor([[0.5, 1.0]]), torch.tensor([3]), torch.full((1, 1, 1), 8.0)
    y, after = causal_conv1d(x, weight, lengths=lengths, state=state, return_state=True)
    torch.testing.assert_close(y[0, :3, 0], silu(5.0, 2.5, 4.0))
    assert after.item() == 3.0, "the last valid frame, not the last of the row"
    y, after = causal_conv1d(x, weight, lengths=lengths, state=state, reverse=True, return_state=True)
    torch.testing.assert_close(y[0, :3, 0], silu(2.0, 3.5, 7.0))
    assert after.item() == 1.0


def arguments(dtype, frames=40, channels=21, width=4):
    shapes = ((3, frames, channels), (channels, width), (channels,), (3, width - 1, channels))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", list(LIMITS))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("frames", "width"), [(1, 4), (2, 4), (40, 4), (40, 2), (40, 7), (300, 4), (6, 12)])
def test_outputs_and_gradients_are_the_plain_ones(backend, reverse, frames, width):
    dtype, limit = LIMITS[backend]
    results = []
    for name, kind in (("torch", torch.float64), (backend, dtype)):
        torch.manual_seed(0)
        x, weight, bias, state = leaves = arguments(kind, frames, width=width)
        lengths = torch.tensor([frames, frames // 2, 0])
        options = {"lengths": lengths, "reverse": reverse, "state": state, "return_state": True, "backend": name}
        y, after = causal_conv1d(x, weight, bias, **options)
        gradients = torch.autograd.grad(y.square().sum() + after.square().sum(), leaves)
        results.append([y.detach(), after.detach(), *gradients])
    for expected, got in zip(*results, strict=True):
        assert relative_error(got, expected) <= limit


@pytest.mark.parametrize("backend", list(LIMITS))
@pytest.mark.parametrize("reverse", [False, True])
def test_chunks_through_the_state_equal_the_whole(backend, reverse):
    x, weight, bias, state = (v.detach() for v in arguments(LIMITS[backend][0]))
    options = {"reverse": reverse, "return_state": True, "backend": backend}
    whole, end = causal_conv1d(x, weight, bias, state=state, **options)
    cuts = [(0, 1), (1, 3), (3, 20), (20, 40)]
    parts = []
    for begin, stop in reversed(cuts) if reverse else cuts:
        y, state = causal_conv1d(x[:, begin:stop], weight, bias, state=state, **options)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts[::-1] if reverse else parts, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, end)


@pytest.mark.parametrize("backend", list(LIMITS))
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend, reverse):
    x, weight, bias, state = arguments(LIMITS[backend][0])
    with torch.no_grad():
        x[0, 17:] = float("nan")
    lengths = torch.tensor([17, 40, 0])
    y = causal_conv1d(x, weight, bias, lengths=lengths, state=state, reverse=reverse, backend=backend)
    alone = causal_conv1d(x[:1, :17], weight, bias, state=state[:1], reverse=reverse, backend=backend)
    torch.testing.assert_close(y[:1, :17], alone)
    assert (y[0, 17:] == 0).all() and (y[2] == 0).all()
    y.sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in (x, weight, bias, state)) and (x.grad[0, 17:] == 0).all()


def test_gradcheck():
    x, weight, bias, state = arguments(torch.float64, frames=5, channels=2)

    def call(*values, reverse):
        x, weight, bias, state = values
        lengths = torch.tensor([5, 2, 0])
        return causal_conv1d(x, weight, bias, lengths=lengths, state=state, reverse=reverse, return_state=True)

    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda *v, r=reverse: call(*v, reverse=r), (x, weight, bias, state))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(20, 4)}, r"weight has shape \(20, 4\), expected \(21, W\)"),
        ({"bias": torch.zeros(20)}, r"bias has shape \(20,\), expected \(21,\)"),
        ({"state": torch.zeros(3, 4, 21)}, r"state has shape \(3, 4, 21\), expected \(3, 3, 21\)"),
        ({"lengths": torch.tensor([8, 9, 41])}, r"lengths\[2\] is 41, expected 0 to 40 frames"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' is not one of: auto torch cpu triton causal_conv1d"),
        ({"backend": "causal_conv1d"}, "'causal_conv1d' runs on cuda, given x on cpu"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    x, weight, bias, state = (v.detach() for v in arguments(torch.float32))
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**({"x": x, "weight": weight, "bias": bias, "state": state} | changes))
