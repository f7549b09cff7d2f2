"""The backends of the selective scan: where each stands, what it takes, which one ``auto`` means."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from espnet_mamba.ops import compiled
from espnet_mamba.ops.selection import Selector, relative_error, requested
from espnet_mamba.ops.selective_scan.autograd import scan_with_kernels
from espnet_mamba.ops.selective_scan.chunked import scan_chunked
from espnet_mamba.ops.selective_scan.protocol import Direction, Kernels, ScanInputs
from espnet_mamba.ops.selective_scan.reference import scan_reference

BACKENDS = ("reference", "torch", "cpu", "triton", "mamba_ssm")
Scan = Callable[[ScanInputs], tuple[Tensor, tuple[Tensor, ...]]]


def run_backend(backend: str, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the scan by a backend's name, or by the best for ``auto``; arguments are checked already.

    Raises:
        ValueError: no such backend, or one that does not run on the device of x.
    """
    backend = requested(backend, BACKENDS, "selective_scan")
    if backend in ("reference", "torch"):
        return _run(backend, inputs)
    return _run_chosen(backend, inputs)


@torch.compiler.disable  # kernels are opaque to a compiler: the graph breaks around them, the "torch" backend is traced
def _run_chosen(backend: str, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _run(choose_backend(backend, inputs), inputs)


def choose_backend(backend: str, inputs: ScanInputs) -> str:
    """Return the name of the backend that will serve a call; what cannot serve it is replaced and said so once.

    Raises:
        ValueError: no such backend, or one that does not run on the device of x.
    """
    device, backend = inputs.x.device, requested(backend, BACKENDS, "selective_scan")
    wanted = {"cpu": ("cpu",), "triton": ("cuda",), "mamba_ssm": ("cuda",)}.get(backend)
    if wanted and device.type not in wanted and not _interpreted(backend):
        raise ValueError(f"selective_scan: backend {backend!r} runs on {' '.join(wanted)}, given x on {device}")
    if backend == "auto" and inputs.x.dtype == torch.float64:
        return SELECTOR.fallback
    name = SELECTOR.choose(backend, device, inputs.x.dtype)
    reason = _refuses(name, inputs)
    return SELECTOR.fall_back(name, reason) if reason else name


def kernels_of(name: str) -> Kernels | None:
    """Return a backend's own forward and backward passes, or None if it has none apart from autograd."""
    if name == "cpu":
        from espnet_mamba.ops.selective_scan import cpu

        return cpu.KERNELS
    if name == "triton":
        from espnet_mamba.ops.selective_scan import triton_scan

        return triton_scan.KERNELS
    return None


def _run(name: str, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    kernels = kernels_of(name)
    if kernels is not None:
        return scan_with_kernels(kernels, convert(inputs, kernels.dtypes))
    wide = inputs.directions[0].A.dtype
    if name == "mamba_ssm":
        from espnet_mamba.ops.selective_scan import mamba_ssm_adapter

        return mamba_ssm_adapter.scan(convert(inputs, (torch.float32, torch.float16, torch.bfloat16)))
    return (scan_reference if name == "reference" else scan_chunked)(convert(inputs, (wide,)))


def convert(inputs: ScanInputs, dtypes: tuple[torch.dtype, ...]) -> ScanInputs:
    """Return the inputs with x, z, dt, Bmat and Cmat in x's type if that is one of ``dtypes``, else in the first."""
    dtype = inputs.x.dtype if inputs.x.dtype in dtypes else dtypes[0]
    directions = []
    for dt, A, Bmat, Cmat, *others in inputs.directions:
        directions.append(Direction(dt.to(dtype), A, Bmat.to(dtype), Cmat.to(dtype), *others))
    z = None if inputs.z is None else inputs.z.to(dtype)
    return ScanInputs(inputs.x.to(dtype), z, inputs.lengths, tuple(directions), inputs.dt_softplus)


@functools.cache
def unavailable(name: str) -> str:
    """Return why a backend cannot run on this machine, or an empty string."""
    if name == "cpu":
        return compiled.unavailable_reason()
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "mamba_ssm":
        from espnet_mamba.ops.selective_scan import mamba_ssm_adapter

        return mamba_ssm_adapter.available()
    return ""


def _interpreted(name: str) -> bool:
    """Whether Triton's interpreter is on, which runs kernels on the CPU for tests."""
    if name != "triton" or unavailable("triton"):
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _refuses(name: str, inputs: ScanInputs) -> str:
    """Return why a backend cannot take this call, or an empty string."""
    if name in ("cpu", "triton", "mamba_ssm") and inputs.x.dtype == torch.float64:
        return "computes in float32, given float64"
    if name == "triton":
        from espnet_mamba.ops.selective_scan import triton_scan

        return triton_scan.refuses(inputs)
    if name == "mamba_ssm":
        from espnet_mamba.ops.selective_scan import mamba_ssm_adapter

        return mamba_ssm_adapter.refuses(inputs)
    return ""


def reference_error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Return how far a backend is from the reference on a small input: outputs and gradients, relative to the largest.

    The numbers come from a generator of their own: a check must not move the caller's random state.
    """
    expected = _probe(scan_reference, torch.device("cpu"), torch.float64, dtype)
    got = _probe(lambda inputs: _run(name, inputs), device, dtype, dtype)
    return max(relative_error(a.cpu(), b) for a, b in zip(got, expected, strict=True))


def _probe(scan: Scan, device: torch.device, dtype: torch.dtype, rounded: torch.dtype) -> list[Tensor]:
    """Run two directions over two utterances of 19 and 11 frames, 21 channels, 16 states; return outputs, gradients."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, wide: bool = False) -> Tensor:
        values = torch.randn(shape, generator=generator).to(torch.float32 if wide else rounded)
        kind = (torch.float64 if dtype == torch.float64 else torch.float32) if wide else dtype
        return values.to(device, kind).requires_grad_()

    leaves = [leaf(2, 19, 21), leaf(2, 19, 21)]
    directions = []
    for reverse in (False, True):
        parts = [leaf(2, 19, 21), leaf(21, 16, wide=True), leaf(2, 19, 16), leaf(2, 19, 16), leaf(21, wide=True)]
        parts += [leaf(21, wide=True), leaf(2, 21, 16, wide=True)]
        leaves += parts
        directions.append(Direction(parts[0], -parts[1].exp(), *parts[2:], reverse))
    lengths = torch.tensor([19, 11], device=device)
    y, last = scan(ScanInputs(leaves[0], leaves[1], lengths, tuple(directions), True))
    loss = y.double().square().sum() + sum(state.double().square().sum() for state in last)
    return [y.detach(), *(v.detach() for v in last), *torch.autograd.grad(loss, leaves)]


SELECTOR = Selector(
    "selective_scan",
    preferred={"cpu": ["cpu"], "cuda": ["triton"]},
    fallback="torch",
    unavailable=unavailable,
    error=reference_error,
)
