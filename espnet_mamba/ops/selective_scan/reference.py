"""The selective scan by its definition: one loop over frames, any float type. Every other backend is tested against it.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs


def scan_reference(inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Scan each direction, add them up, gate (Mamba, docs/papers.md 2); differentiable by autograd.

    Args:
        inputs: see ``ScanInputs``.

    Returns:
        ``y (B, T, E)``, and per direction the state after its last scanned frame ``(B, E, N)``.
    """
    x, z, lengths, directions, dt_softplus = inputs
    ends = x.new_full((len(x),), x.shape[1], dtype=torch.long) if lengths is None else lengths
    results = [_scan_direction(x, ends, direction, dt_softplus) for direction in directions]
    y = sum(result[0] for result in results)
    padding = (torch.arange(x.shape[1], device=x.device) >= ends[:, None])[..., None]
    if z is not None:
        y = y * F.silu(z.masked_fill(padding, 0.0))
    return y.masked_fill(padding, 0.0), tuple(result[1] for result in results)


def _scan_direction(x: Tensor, ends: Tensor, direction: Direction, dt_softplus: bool) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = C_t . h_t + D x_t`` over valid frames only."""
    dt, A, Bmat, Cmat, D_skip, dt_bias, state, reverse = direction
    if state is None:
        state = A.new_zeros(x.shape[0], *A.shape)
    # unbind, not v[:, t]: the gradient of a select is a full-size tensor, so the backward pass would be quadratic in T
    frames = list(zip(*(v.unbind(1) for v in (x, dt, Bmat, Cmat)), strict=True))
    outputs: list[Tensor] = [x] * len(frames)
    for t in reversed(range(len(frames))) if reverse else range(len(frames)):
        padding = (t >= ends)[:, None]
        x_t, dt_t, b_t, c_t = (v.masked_fill(padding, 0.0) for v in frames[t])  # what stands there may be NaN
        step = dt_t if dt_bias is None else dt_t + dt_bias
        step = (F.softplus(step) if dt_softplus else step).masked_fill(padding, 0.0)  # a step of 0 keeps the state
        decay = torch.exp(step[..., None] * A)  # (B, E, N)
        state = decay * state + (step * x_t)[..., None] * b_t[:, None]
        outputs[t] = (state * c_t[:, None]).sum(-1) + (0 if D_skip is None else D_skip * x_t)
    return torch.stack(outputs, dim=1), state
