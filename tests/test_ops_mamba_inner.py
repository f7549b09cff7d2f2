"""The fused path against its composition: values, gradients, padding, and what it keeps in memory."""

import pytest
import torch

from espnet_mamba.ops.mamba_inner import Branch, mamba_inner, mamba_inner_plain
from espnet_mamba.ops.selection import relative_error
from espnet_mamba.ops.selective_scan import backends

CHANNELS, STATES, RANK = 37, 16, 3
needs_kernels = pytest.mark.skipif(bool(backends.unavailable("cpu")), reason="no compiled kernels on this machine")


def leaves(num_branches, frames=40, channels=CHANNELS, states=STATES, rank=RANK, dtype=torch.float32):
    shapes = [(3, frames, 2 * channels), (channels, 4), (channels,)]
    for _ in range(num_branches):
        shapes += [(rank + 2 * states, channels), (channels, rank), (channels,), (channels, states), (channels,)]
    return [(torch.randn(shape, dtype=torch.float32) * 0.5).to(dtype).requires_grad_() for shape in shapes]


def call(function, tensors, reverse=(False,), **options):
    branches = []
    for index, flag in enumerate(reverse):
        x_proj, dt_proj, dt_bias, A_log, D = tensors[3 + 5 * index : 8 + 5 * index]
        branches.append(Branch(x_proj, dt_proj, dt_bias, -A_log.exp(), D, flag))
    return function(*tensors[:3], branches, **options)


def results(function, tensors, weight, **options):
    y = call(function, tensors, **options)
    gradients = torch.autograd.grad((y * weight).sum(), tensors)
    return [y.detach(), *gradients]


@needs_kernels
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_are_the_compositions(reverse, padded):
    tensors = leaves(len(reverse))
    weight = torch.randn(3, 40, CHANNELS)
    lengths = torch.tensor([40, 23, 1]) if padded else None
    options = {"reverse": reverse, "conv_reverse": reverse[0], "lengths": lengths}
    got = results(mamba_inner, tensors, weight, backend="cpu", **options)
    exact = [v.detach().double().requires_grad_() for v in tensors]
    expected = results(mamba_inner_plain, exact, weight.double(), backend="reference", **options)
    for one, other in zip(got, expected, strict=True):
        assert relative_error(one, other) <= 1e-5


@needs_kernels
def test_padding_is_never_read():
    tensors, lengths = leaves(2), torch.tensor([40, 23, 0])
    with torch.no_grad():
        tensors[0][1, 23:] = float("nan")
        tensors[0][2] = float("nan")
    y = call(mamba_inner, tensors, (False, True), lengths=lengths)
    assert (y[1, 23:] == 0).all() and (y[2] == 0).all() and torch.isfinite(y).all()
    y.sum().backward()
    assert all(torch.isfinite(v.grad).all() for v in tensors) and (tensors[0].grad[1, 23:] == 0).all()


@needs_kernels
def test_autocast_rounds_the_projections_only():
    tensors = leaves(1)
    plain = call(mamba_inner, tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        xz = tensors[0].to(torch.bfloat16)
        y = call(mamba_inner, [xz, *tensors[1:]])
    assert y.dtype == torch.bfloat16 and relative_error(y, plain) < 3e-2
    y.float().sum().backward()
    assert all(v.grad is not None and v.grad.dtype == torch.float32 for v in tensors)


def bytes_kept(function, tensors, **options):
    """What autograd holds between the passes, each storage once, the leaves left out."""
    own = {v.untyped_storage().data_ptr() for v in tensors}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(function, tensors, **options)
    return sum(size for size, _ in kept.values())


@needs_kernels
def test_memory_kept_per_frame_is_as_the_documentation_says():
    """docs/benchmarks.md: beside in_proj's output, R + 2 N + E N / 16 floats per frame, and the weights' own."""
    frames, channels = 320, 64
    tensors = leaves(1, frames=frames, channels=channels)
    fused = bytes_kept(mamba_inner, tensors, backend="cpu")
    weights = 2 * 4 * channels * STATES  # exp(A_log) and A
    per_frame = (fused - weights) / (3 * frames)
    assert per_frame == pytest.approx(4 * (RANK + 2 * STATES + channels * STATES / 16), rel=0.01)
    plain = bytes_kept(mamba_inner_plain, tensors, backend="cpu")
    assert plain > 2 * fused


def test_without_kernels_the_composition_runs():
    tensors = leaves(2, dtype=torch.float64)
    got = call(mamba_inner, tensors, (False, True), backend="auto")
    torch.testing.assert_close(got, call(mamba_inner_plain, tensors, (False, True), backend="reference"))
