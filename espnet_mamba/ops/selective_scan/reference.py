"""The selective scan by its definition: one loop over frames, any float type. Every other backend is tested against it.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run ``h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t``, ``y_t = C_t . h_t`` frame by frame (Mamba, docs/papers.md 2).

    Args:
        x: input ``(B, T, E)``.
        dt: step sizes after softplus ``(B, T, E)``; a frame with ``dt = 0`` leaves the state as it is.
        A: decay rates, negative ``(E, N)``.
        Bmat: input weights ``(B, T, N)``.
        Cmat: output weights ``(B, T, N)``.
        state: state before frame 0 ``(B, E, N)``.

    Returns:
        ``y (B, T, E)`` and the state after the last frame ``(B, E, N)``.
    """
    outputs = []
    frames = zip(x.unbind(1), dt.unbind(1), Bmat.unbind(1), Cmat.unbind(1), strict=True)
    for x_t, dt_t, b_t, c_t in frames:
        decay = torch.exp(dt_t[..., None] * A)  # (B, E, N)
        state = decay * state + (dt_t * x_t)[..., None] * b_t[:, None]
        outputs.append((state * c_t[:, None]).sum(-1))
    return torch.stack(outputs, dim=1), state
