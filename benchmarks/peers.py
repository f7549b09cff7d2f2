"""What the scan is compared with: our backends, other people's scans, and two things of the same width for scale.

Letters: B utterances, T frames, E channels, N states, R rank of the step sizes, D = E / 2 the width of the block.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timing import Job
from torch import Tensor, nn

from espnet_mamba.ops.selective_scan import (
    BACKENDS,
    Direction,
    chunked,
    selective_scan,
    selective_scan_bidirectional,
)
from espnet_mamba.ops.selective_scan.backends import unavailable
from espnet_mamba.ops.selective_scan.protocol import ScanInputs

# Lengths of a padded batch, as shares of T; they repeat over the batch.
SHARES = (1.0, 0.5, 0.25, 0.75)


class Case(NamedTuple):
    """One shape on one device."""

    batch: int
    channels: int
    frames: int
    states: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def activation_mb(self) -> float:
        """MiB of one ``(B, T, E)`` tensor."""
        return self.batch * self.frames * self.channels * self.dtype.itemsize / 2**20

    @property
    def states_mb(self) -> float:
        """MiB of one float32 ``(B, T, E, N)`` tensor, which the slow paths store several times."""
        return self.batch * self.frames * self.channels * self.states * 4 / 2**20

    @property
    def label(self) -> str:
        """``(B, E, T, N) = ...``."""
        return f"(B, E, T, N) = ({self.batch}, {self.channels}, {self.frames}, {self.states})"


class Peer(NamedTuple):
    """One candidate."""

    title: str
    build: Callable[[Case], Job]
    refuses: Callable[[Case], str] = lambda case: ""  # why it cannot run here, or ""
    state_copies: tuple[float, float] = (0.0, 0.0)  # (B, T, E, N) arrays in memory at the peak: forward, f+b
    quadratic: bool = False  # backward in T


@functools.cache  # candidates share their inputs: twelve copies of them would fill the memory
def inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Return the arguments of ``selective_scan`` as they are inside a block, as leaves that want gradients.

    Step sizes and rates are spread as at Mamba's initialisation; z is half of in_proj's output, Bmat and Cmat are parts
    of x_proj's, so their frames are not contiguous.
    """
    generator = torch.Generator().manual_seed(seed)
    B, E, T, N, device, dtype = case
    rank = math.ceil(E / 32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    steps = torch.exp(torch.rand(E, generator=generator) * math.log(100) + math.log(1e-3))
    rates = torch.arange(1, N + 1) * torch.exp(0.2 * normal(E, N))
    joint = normal(B, T, rank + 2 * N)
    tensors = {
        "x": normal(B, T, E),
        "dt": 0.5 * normal(B, T, E),
        "A": -rates,
        "Bmat": joint[..., rank : rank + N],
        "Cmat": joint[..., rank + N :],
        "D_skip": normal(E),
        "z": normal(B, T, 2 * E)[..., E:],
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),  # inverse of softplus
    }
    wide = ("A", "D_skip", "dt_bias")
    return {
        name: v.to(device, v.dtype if name in wide and dtype != torch.float64 else dtype).detach().requires_grad_()
        for name, v in tensors.items()
    }


def lengths_of(case: Case) -> Tensor:
    """Return the lengths of a padded batch, 62 % of its frames."""
    shares = [SHARES[i % len(SHARES)] for i in range(case.batch)] if case.batch > 1 else [0.625]
    return torch.tensor([max(1, round(share * case.frames)) for share in shares])


def build_job(name: str, case: Case) -> Job:
    """Return a candidate on fresh inputs; a function of its own so that another process can call it."""
    return PEERS[name].build(case)


def refusal(name: str, case: Case, which: int, free_mb: float) -> str:
    """Return why a candidate is left out (``which`` is 0 for forward, 1 for forward+backward), or an empty string."""
    peer = PEERS[name]
    reason = peer.refuses(case)
    need = peer.state_copies[which] * case.states_mb
    if not reason and need > 0.8 * free_mb:
        return f"would take about {need / 1024:.0f} GiB, {free_mb / 1024:.0f} GiB are free"
    return reason


@functools.cache
def output_grad(case: Case) -> Tensor:
    """Return the gradient that arrives at the output ``(B, T, E)``."""
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(case.batch, case.frames, case.channels, generator=generator)
    return grad.to(case.device, case.dtype)


def forget_inputs() -> None:
    """Free what ``inputs`` and ``output_grad`` keep for the candidates to share."""
    inputs.cache_clear()
    output_grad.cache_clear()


def _job(case: Case, leaves: dict[str, Tensor], scan: Callable[..., Tensor]) -> Job:
    return Job(lambda: scan(**leaves), list(leaves.values()), output_grad(case))


def _ours(backend: str, padded: bool = False, reverse: bool = False) -> Callable[[Case], Job]:
    def build(case: Case) -> Job:
        options = {"backend": backend, "reverse": reverse, "lengths": lengths_of(case) if padded else None}
        return _job(case, inputs(case), lambda **leaves: selective_scan(**leaves, **options))

    return build


def _both(backend: str) -> Callable[[Case], Job]:
    """Both directions of InnBiMamba in one call, each with its own dt, A, Bmat, Cmat."""

    def build(case: Case) -> Job:
        leaves = inputs(case)
        back = {f"back_{name}": v for name, v in inputs(case, seed=2).items() if name not in ("x", "z")}

        def scan(x: Tensor, z: Tensor, **rest: Tensor) -> Tensor:
            names = ("dt", "A", "Bmat", "Cmat", "D_skip", "dt_bias")
            ahead = Direction(*(rest[name] for name in names), None, False)
            behind = Direction(*(rest[f"back_{name}"] for name in names), None, True)
            return selective_scan_bidirectional(x, [ahead, behind], z, backend=backend)

        return _job(case, leaves | back, scan)

    return build


def _refuses_ours(backend: str) -> Callable[[Case], str]:
    def refuses(case: Case) -> str:
        wanted = {"cpu": "cpu", "triton": "cuda", "mamba_ssm": "cuda"}.get(backend)
        if wanted and not case.device.startswith(wanted):
            return f"runs on {wanted} only"
        try:
            return unavailable(backend)
        except ImportError as error:  # a backend whose file is not there
            return str(error)

    return refuses


def _compiled(case: Case) -> Job:
    """The chunked form with the work of one segment under torch.compile, and the loop over segments outside.

    A compiler unrolls that loop when it is given the whole scan: minutes to compile, and no faster.
    """
    spec = importlib.util.spec_from_file_location("chunked_compiled", chunked.__file__)
    module = importlib.util.module_from_spec(spec)  # a copy of its own: the plain form runs in the same process
    spec.loader.exec_module(module)
    for name in ("_states", "_segment_backward"):
        setattr(module, name, torch.compile(getattr(module, name), dynamic=False))

    def scan(x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, D_skip: Tensor, **rest: Tensor) -> Tensor:
        direction = Direction(dt, A, Bmat, Cmat, D_skip, rest["dt_bias"], None, False)
        return module.scan_chunked(ScanInputs(x, rest["z"], None, (direction,), True))[0]

    return _job(case, inputs(case), scan)._replace(compiles=True)


# ---- other people's scans


def select_loop(
    x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, D_skip: Tensor, z: Tensor, dt_bias: Tensor
) -> Tensor:
    """The plain loop as reference implementations have it: all decays first, then each frame taken out by an index.

    The gradient of every such index is a zero tensor as large as what was indexed, so backward is quadratic in T.

    Args:
        x: ``(B, E, T)``, as are ``dt``, ``z`` and the result; ``Bmat`` and ``Cmat`` are ``(B, N, T)``.
    """
    step = F.softplus(dt + dt_bias[:, None])
    decay = torch.exp(step[..., None] * A[:, None])  # (B, E, T, N)
    drive = (step * x)[..., None] * Bmat.transpose(1, 2)[:, None]
    state = x.new_zeros(x.shape[0], *A.shape)
    outputs = []
    for t in range(x.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, Cmat[:, :, t]))
    return (torch.stack(outputs, dim=2) + D_skip[:, None] * x) * F.silu(z)


def _channels_first(case: Case, scan: Callable[..., Tensor]) -> Job:
    """Give a scan its own layout, (B, E, T) and (B, N, T), so that it pays for no transposes."""
    over_time = ("x", "dt", "z", "Bmat", "Cmat")
    leaves = {
        name: (v.transpose(1, 2).contiguous() if name in over_time else v).detach().requires_grad_()
        for name, v in inputs(case).items()
    }
    grad = output_grad(case).transpose(1, 2).contiguous()
    return Job(lambda: scan(**leaves), list(leaves.values()), grad)


def _select_loop(case: Case) -> Job:
    return _channels_first(case, select_loop)


def _transformers(case: Case) -> Job:
    """The scan of transformers' slow path, which is a function of its own in the versions that this takes."""
    from transformers.models.mamba import modeling_mamba

    function = inspect.unwrap(modeling_mamba.mamba_selective_scan)  # without the look for CUDA packages around it

    def scan(x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, **rest: Tensor) -> Tensor:
        options = {"D": rest["D_skip"], "z": rest["z"], "delta_bias": rest["dt_bias"], "delta_softplus": True}
        return function(x, dt, A, Bmat, Cmat, **options)

    return _channels_first(case, scan)


def _refuses_transformers(case: Case) -> str:
    if importlib.util.find_spec("transformers") is None:
        return "not installed: pip install transformers"
    from transformers.models.mamba import modeling_mamba

    if not hasattr(modeling_mamba, "mamba_selective_scan"):
        return "this version has its scan inside MambaMixer, where it cannot be timed alone"
    return ""


def _mambapy(case: Case) -> Job:
    from mambapy.pscan import pscan

    def scan(x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, **rest: Tensor) -> Tensor:
        step = F.softplus(dt + rest["dt_bias"])
        decay = torch.exp(step[..., None] * A)  # (B, T, E, N)
        states = pscan(decay, (step * x)[..., None] * Bmat[:, :, None])
        return ((states @ Cmat[..., None]).squeeze(-1) + rest["D_skip"] * x) * F.silu(rest["z"])

    return _job(case, inputs(case), scan)


def _refuses_mambapy(case: Case) -> str:
    found = importlib.util.find_spec("mambapy") is not None
    return "" if found else "not installed: pip install --no-deps -r benchmarks/requirements.txt"


# ---- for scale


def block_rank(width: int) -> int:
    """Return R, the rank of the step sizes in a Mamba block of this width."""
    return math.ceil(width / 16)


def projections(B: int, T: int, D: int, E: int, N: int, device: str, dtype: torch.dtype) -> Job:
    """Return a Mamba block's four matrix products, each on an input of its own: nothing but the products is timed."""
    rank = block_rank(D)
    sizes = ((D, 2 * E), (E, rank + 2 * N), (rank, E), (E, D))  # in_proj, x_proj, dt_proj, out_proj
    xs = [torch.randn(B, T, size, device=device, dtype=dtype, requires_grad=True) for size, _ in sizes]
    weights = [(torch.randn(b, a, device=device, dtype=dtype) / a**0.5).requires_grad_() for a, b in sizes]
    grads = [torch.randn(B, T, size, device=device, dtype=dtype) for _, size in sizes]
    return Job(lambda: [F.linear(x, w) for x, w in zip(xs, weights, strict=True)], [*xs, *weights], grads)


class TransformerLayer(nn.Module):
    """Post-norm layer as HuBERT's: fused attention with heads of 64 channels, feed-forward part of 4 D with GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        if width % self.heads:
            raise ValueError(f"width {width} does not divide into {self.heads} heads")
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.out(attended))
        return self.norms[1](x + self.narrow(F.gelu(self.wide(x))))


def module_job(module: nn.Module, shape: Sequence[int], device: str, dtype: torch.dtype) -> Job:
    """Return a module on a random input, with gradients of the input and all weights; its first output counts."""
    module = module.to(device, dtype)
    x = torch.randn(*shape, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn(*shape, device=device, dtype=dtype)

    def call() -> Any:
        y = module(x)
        return y[0] if isinstance(y, tuple) else y

    return Job(call, [x, *module.parameters()], grad)


def _projections(case: Case) -> Job:
    B, E, T, N, device, dtype = case
    return projections(B, T, E // 2, E, N, device, dtype)


def _transformer_layer(case: Case) -> Job:
    width = case.channels // 2
    return module_job(TransformerLayer(width), (case.batch, case.frames, width), case.device, case.dtype)


def _ours_peers() -> dict[str, Peer]:
    peers = {}
    for name in BACKENDS:
        copies = (0.5, 8.0) if name == "reference" else (0.0, 0.0)
        title = "reference (loop with unbind)" if name == "reference" else name
        refuses = _refuses_ours(name)
        peers[name] = Peer(title, _ours(name), refuses, copies)
        peers[f"{name} reverse"] = Peer(f"{title}, reversed", _ours(name, reverse=True), refuses, copies)
        padded = Peer(f"{title}, padded batch (62 % valid)", _ours(name, padded=True), refuses, copies)
        peers[f"{name} padded"] = padded
        peers[f"{name} both"] = Peer(f"{title}, two directions in one call", _both(name), refuses, copies)
    return peers


PEERS: dict[str, Peer] = _ours_peers() | {
    "compiled": Peer("torch, segments under torch.compile", _compiled),
    "select": Peer("loop with select (B, E, T)", _select_loop, state_copies=(4, 9), quadratic=True),
    "transformers": Peer("transformers, slow path", _transformers, _refuses_transformers, (4.5, 10), quadratic=True),
    "mambapy": Peer("mambapy pscan", _mambapy, _refuses_mambapy, (5, 12)),
    "projections": Peer("the block's four matmuls", _projections),
    "layer": Peer("Transformer layer, D = E / 2", _transformer_layer),
}
OTHERS = ("compiled", "select", "transformers", "mambapy", "projections", "layer")
