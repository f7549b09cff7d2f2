"""mamba-ssm's CUDA kernel of the selective scan behind our semantics, for those who have built it.

The kernel knows neither lengths nor direction: padding is handed to it as frames with a step size of 0, and a reversed
direction as utterances flipped within their lengths, which costs copies. It takes no start state, and it computes no
gradient of the last state. Works with any release that has ``selective_scan_fn``; imported on first use only.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs

MODULE = "mamba_ssm.ops.selective_scan_interface"
MAX_STATES = 256
CLOSED = -1e4  # a raw step size whose softplus is exactly 0 in float32, and which float16 can hold


def available() -> str:
    """Return why the package cannot be used, or an empty string."""
    try:
        _function()
    except Exception as error:  # a wheel built against another torch fails to load in many ways
        return f"mamba_ssm cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    # some versions import without their CUDA part and fail when called
    if getattr(importlib.import_module(MODULE), "selective_scan_cuda", MODULE) is None:
        return "mamba_ssm was built without selective_scan_cuda"
    return ""


def refuses(inputs: ScanInputs) -> str:
    """Return why the package's kernel cannot take a call, or an empty string."""
    if any(direction.state is not None for direction in inputs.directions):
        return "mamba_ssm takes no start state"
    num_states = inputs.directions[0].A.shape[1]
    if num_states > MAX_STATES:
        return f"mamba_ssm takes at most {MAX_STATES} states, given {num_states}"
    return ""


def scan(inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scan each direction with the package's kernel, add them up, gate; differentiable by autograd.

    Returns:
        ``y (B, T, E)``, and per direction the state after its last scanned frame ``(B, E, N)``.

    Raises:
        ImportError: the package is not there.
        ValueError: the kernel cannot take these inputs.
        RuntimeError: on the way back, a gradient arrives at a last state.
    """
    reason = refuses(inputs)
    if reason:
        raise ValueError(f"selective_scan: {reason}")
    x, z, lengths, directions, dt_softplus = inputs
    padding = None
    if lengths is not None:
        padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
        x = x.masked_fill(padding, 0.0)  # masked_fill, not multiplication: NaN in the padding must not come through
        z = None if z is None else z.masked_fill(padding, 0.0)
    if len(directions) == 1:
        y, last = _scan_direction(x, z, padding, lengths, directions[0], dt_softplus)
        return y, (last,)
    results = [_scan_direction(x, None, padding, lengths, direction, dt_softplus) for direction in directions]
    y = results[0][0].float() + results[1][0].float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), tuple(last for _, last in results)


def _scan_direction(
    x: Tensor,
    z: Tensor | None,
    padding: Tensor | None,
    lengths: Tensor | None,
    direction: Direction,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    dt, A, Bmat, Cmat, D_skip, dt_bias, _, reverse = direction
    if not dt_softplus and dt_bias is not None:
        dt, dt_bias = (dt + dt_bias).to(dt.dtype), None  # before padding is closed: 0 + bias would not be
    if padding is not None:
        dt = dt.masked_fill(padding, CLOSED if dt_softplus else 0.0)
        Bmat, Cmat = Bmat.masked_fill(padding, 0.0), Cmat.masked_fill(padding, 0.0)
    order = _reversal(x, lengths) if reverse else None
    u, gate, step, b, c = (None if v is None else _taken(v, order).transpose(1, 2) for v in (x, z, dt, Bmat, Cmat))
    y, last = _function()(
        u,
        step,
        A,
        b.contiguous(),
        c.contiguous(),
        D=D_skip,
        z=gate,
        delta_bias=dt_bias,
        delta_softplus=dt_softplus,
        return_last_state=True,
    )
    return _taken(y.transpose(1, 2), order), _NoGradient.apply(last)


def _reversal(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which frame stands where when the valid part of each utterance is flipped, ``(B, T)``; its own inverse."""
    frames = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    ends = torch.full_like(frames[:, :1], x.shape[1]) if lengths is None else lengths[:, None]
    return torch.where(frames < ends, ends - 1 - frames, frames)


def _taken(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.gather(1, order[..., None].expand_as(tensor))


class _NoGradient(torch.autograd.Function):
    """The kernel drops the gradient of its last state without a word; this says so instead."""

    @staticmethod
    def forward(ctx: Any, last: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError("selective_scan: mamba_ssm computes no gradient of the last state; use another backend")


def _function() -> Callable[..., Any]:
    return importlib.import_module(MODULE).selective_scan_fn
