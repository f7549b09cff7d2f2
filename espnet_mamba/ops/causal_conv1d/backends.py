"""The backends of the convolution: where each stands, what it takes, which one ``auto`` means."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_mamba.ops import compiled
from espnet_mamba.ops.causal_conv1d.torch_conv import conv_torch
from espnet_mamba.ops.selection import Selector, relative_error, requested

BACKENDS = ("torch", "cpu", "triton", "causal_conv1d")
SCAN_NAMES = {"reference": "torch", "mamba_ssm": "causal_conv1d"}  # the scan's backend -> the convolution's
KERNEL_WIDTHS = range(2, 9)  # taps that the compiled kernels take
# x, weight, bias, lengths, reverse, state
Arguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, bool, Tensor | None]


class ConvKernels(NamedTuple):
    """A backend's own passes; ``forward(*arguments)``, ``backward(*arguments, grad_y, grad_x)``."""

    forward: Any
    backward: Any
    dtypes: tuple[torch.dtype, ...]  # types of x and y that it takes; others are converted to the first


def run_backend(backend: str, arguments: Arguments) -> Tensor:
    """Run the convolution by a backend's name, or by the best for ``auto``; arguments are checked already.

    Raises:
        ValueError: no such backend, or one that does not run on the device of x.
    """
    backend = _requested(backend)
    if backend == "torch":
        return _run("torch", arguments)
    return _run_chosen(backend, arguments)


@torch.compiler.disable  # kernels are opaque to a compiler: the graph breaks around them, the "torch" backend is traced
def _run_chosen(backend: str, arguments: Arguments) -> Tensor:
    return _run(choose_backend(backend, arguments), arguments)


def choose_backend(backend: str, arguments: Arguments) -> str:
    """Return the name of the backend that will serve a call; what cannot serve it is replaced and said so once.

    Raises:
        ValueError: no such backend, or one that does not run on the device of x.
    """
    x, weight = arguments[:2]
    backend = _requested(backend)
    wanted = {"cpu": "cpu", "triton": "cuda", "causal_conv1d": "cuda"}.get(backend)
    if wanted and x.device.type != wanted and not (backend == "triton" and _interpreted()):
        raise ValueError(f"causal_conv1d: backend {backend!r} runs on {wanted}, given x on {x.device}")
    if backend == "auto" and (x.dtype == torch.float64 or weight.shape[1] not in KERNEL_WIDTHS):
        return SELECTOR.fallback
    name = SELECTOR.choose(backend, x.device, x.dtype)
    reason = _refuses(name, arguments)
    return SELECTOR.fall_back(name, reason) if reason else name


def kernels_of(name: str) -> ConvKernels | None:
    """Return a backend's own forward and backward passes, or None if it has none apart from autograd."""
    if name == "cpu":
        from espnet_mamba.ops.causal_conv1d import cpu

        return ConvKernels(cpu.forward, cpu.backward, (torch.float32,))
    if name == "triton":
        from espnet_mamba.ops.causal_conv1d import triton_conv

        return ConvKernels(triton_conv.forward, triton_conv.backward, (torch.float32, torch.bfloat16, torch.float16))
    return None


def _run(name: str, arguments: Arguments) -> Tensor:
    kernels = kernels_of(name)
    if kernels is not None:
        return _KernelConv.apply(kernels, *convert(arguments, kernels.dtypes))
    if name == "causal_conv1d":
        from espnet_mamba.ops.causal_conv1d import package_adapter

        return package_adapter.conv(*convert(arguments, (torch.float32, torch.float16, torch.bfloat16)))
    return conv_torch(*convert(arguments, (arguments[0].dtype,)))


def convert(arguments: Arguments, dtypes: tuple[torch.dtype, ...]) -> Arguments:
    """Return the arguments with every tensor in x's type if that is one of ``dtypes``, else in the first."""
    x, weight, bias, lengths, reverse, state = arguments
    dtype = x.dtype if x.dtype in dtypes else dtypes[0]
    weight, bias, state = (v if v is None else v.to(dtype) for v in (weight, bias, state))
    return x.to(dtype), weight, bias, lengths, reverse, state


class _KernelConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ConvKernels, *arguments: Any) -> Tensor:
        x, weight, bias, lengths, ctx.reverse, state = arguments
        ctx.save_for_backward(x, weight, bias, lengths, state)
        ctx.kernels = kernels
        return kernels.forward(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, lengths, state = ctx.saved_tensors
        arguments = (x, weight, bias, lengths, ctx.reverse, state)
        grad_x, grad_weight, grad_bias, grad_state = ctx.kernels.backward(*arguments, grad_y, None)
        return None, grad_x, grad_weight, grad_bias, None, None, grad_state


def _requested(backend: str) -> str:
    """Return the backend asked for; the environment speaks the scan's names, so those are taken too."""
    names = (*BACKENDS, *SCAN_NAMES)
    if backend != "auto" and backend not in BACKENDS:
        names = BACKENDS
    return SCAN_NAMES.get(name := requested(backend, names, "causal_conv1d"), name)


@functools.cache
def unavailable(name: str) -> str:
    """Return why a backend cannot run on this machine, or an empty string."""
    if name == "cpu":
        return compiled.unavailable_reason()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "causal_conv1d":
        from espnet_mamba.ops.causal_conv1d import package_adapter

        return package_adapter.available()
    return ""


def _interpreted() -> bool:
    """Whether Triton's interpreter is on, which runs kernels on the CPU for tests."""
    if unavailable("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _refuses(name: str, arguments: Arguments) -> str:
    """Return why a backend cannot take this call, or an empty string."""
    x, weight = arguments[:2]
    if name != "torch" and x.dtype == torch.float64:
        return "computes in float32, given float64"
    if name in ("cpu", "triton") and weight.shape[1] not in KERNEL_WIDTHS:
        return f"takes kernels of {KERNEL_WIDTHS[0]} to {KERNEL_WIDTHS[-1]} taps, given {weight.shape[1]}"
    if name == "causal_conv1d":
        from espnet_mamba.ops.causal_conv1d import package_adapter

        return package_adapter.refuses(*arguments)
    return ""


def reference_error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far a backend is from the plain one on a small input, relative to the largest; with gradients."""
    worst = 0.0
    for reverse in (False, True):
        expected = _probe("torch", torch.device("cpu"), torch.float64, dtype, reverse)
        got = _probe(name, device, dtype, dtype, reverse)
        worst = max(worst, *(relative_error(a.cpu(), b) for a, b in zip(got, expected, strict=True)))
    return worst


def _probe(name: str, device: torch.device, dtype: torch.dtype, rounded: torch.dtype, reverse: bool) -> list[Tensor]:
    """Run two utterances of 19 and 11 frames, 21 channels, 4 taps, with a state; return the output and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 19, 21), (21, 4), (21,), (2, 3, 21))
    leaves = [torch.randn(shape, generator=generator).to(rounded).to(device, dtype) for shape in shapes]
    x, weight, bias, state = (leaf.requires_grad_() for leaf in leaves)
    y = _run(name, (x, weight, bias, torch.tensor([19, 11], device=device), reverse, state))
    return [y.detach(), *torch.autograd.grad(y.double().square().sum(), leaves)]


SELECTOR = Selector(
    "causal_conv1d",
    preferred={"cpu": ["cpu"], "cuda": ["triton"]},
    fallback="torch",
    unavailable=unavailable,
    error=reference_error,
)
