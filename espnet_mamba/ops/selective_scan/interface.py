"""``selective_scan``: one function, one meaning, several backends.

The backends compute the bare recurrence. Everything whose meaning must not differ between them stands here once:
step-size bias and softplus, padding, direction, skip, gate, number types.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.selective_scan.chunked import scan_chunked
from espnet_mamba.ops.selective_scan.reference import scan_reference

BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": scan_reference,
    "torch": scan_chunked,
}


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    Bmat: Tensor,
    Cmat: Tensor,
    D_skip: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    lengths: Tensor | None = None,
    reverse: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu and Dao 2023, eq. 2 with the Euler form of B; docs/papers.md 2), aware of padding.

    Args:
        x: input ``(B, T, E)``.
        dt: raw step sizes ``(B, T, E)``.
        A: decay rates, negative ``(E, N)``.
        Bmat: input weights ``(B, T, N)``.
        Cmat: output weights ``(B, T, N)``.
        D_skip: weight of the direct path ``(E,)``.
        z: gate ``(B, T, E)``; the output is multiplied by ``SiLU(z)``.
        dt_bias: added to ``dt`` before softplus ``(E,)``.
        dt_softplus: whether ``dt`` goes through softplus.
        lengths: valid frames of each utterance ``(B,)``; later frames are never read and their output is 0.
        reverse: scan from each utterance's own last valid frame towards frame 0.
        state: state before the first scanned frame ``(B, E, N)``; zeros when absent.
        return_state: also return the state after the last scanned frame, in the state's own type.
        backend: ``auto`` or a key of ``BACKENDS``.

    Returns:
        ``y (B, T, E)`` in x's type, and the state ``(B, E, N)`` if asked for. State, A and dt are float32
        (float64 when x is) whatever the type of x.

    Raises:
        ValueError: unknown backend, or shapes that do not fit.
    """
    run = _choose(backend)
    _check_shapes(x, dt, A, Bmat, Cmat, lengths)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, step, gate = x.to(dtype), dt.to(dtype), None if z is None else z.to(dtype)
    A, Bmat, Cmat = A.to(dtype), Bmat.to(dtype), Cmat.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    padding = padding_mask(lengths, x.shape[1])
    if padding is not None:  # masked_fill, not multiplication: NaN in the padding must not come through
        u, step, Bmat, Cmat = (v.masked_fill(padding[..., None], 0.0) for v in (u, step, Bmat, Cmat))
    if state is None:
        state = u.new_zeros(x.shape[0], x.shape[2], A.shape[1])
    order = [v.flip(1) for v in (u, step, Bmat, Cmat)] if reverse else [u, step, Bmat, Cmat]
    y, last = run(order[0], order[1], A, order[2], order[3], state.to(dtype))
    if reverse:
        y = y.flip(1)
    if D_skip is not None:
        y = y + u * D_skip.to(dtype)
    if gate is not None:
        y = y * F.silu(gate)
    if padding is not None:
        y = y.masked_fill(padding[..., None], 0.0)
    y = y.to(x.dtype)
    return (y, last) if return_state else y


def padding_mask(lengths: Tensor | None, num_frames: int) -> Tensor | None:
    """Return ``(B, num_frames)``, true where a frame is padding; None when there is no padding at all.

    Asking costs a device synchronisation, so callers in a hot loop pass ``lengths=None`` for unpadded batches.
    """
    if lengths is None or bool((lengths >= num_frames).all()):
        return None
    return torch.arange(num_frames, device=lengths.device) >= lengths[:, None]


def _choose(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    name = "torch" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"selective_scan: backend {backend!r} is not one of: auto {' '.join(BACKENDS)}")
    return BACKENDS[name]


def _check_shapes(x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, lengths: Tensor | None) -> None:
    num_utterances, num_frames, num_channels = x.shape
    num_states = A.shape[-1]
    wanted = {
        "dt": (dt, x.shape),
        "A": (A, (num_channels, num_states)),
        "Bmat": (Bmat, (num_utterances, num_frames, num_states)),
        "Cmat": (Cmat, (num_utterances, num_frames, num_states)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if lengths is not None and tuple(lengths.shape) != (num_utterances,):
        raise ValueError(f"selective_scan: lengths has shape {tuple(lengths.shape)}, expected ({num_utterances},)")
