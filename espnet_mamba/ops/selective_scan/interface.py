"""``selective_scan``: one function, one meaning, several backends. Arguments are checked and converted here, once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from espnet_mamba.ops.padding import checked_lengths
from espnet_mamba.ops.selective_scan.backends import run_backend
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs

NAME = "selective_scan"


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
        lengths: valid frames of each utterance ``(B,)``, 0 to T; later frames are never read and their output is 0.
        reverse: scan from each utterance's own last valid frame towards frame 0.
        state: state before the first scanned frame ``(B, E, N)``; zeros when absent.
        return_state: also return the state after the last scanned frame, in the state's own type.
        backend: ``auto`` (by device and by what is installed) or one of ``BACKENDS``.

    Returns:
        ``y (B, T, E)`` in x's type, and the state ``(B, E, N)`` if asked for. State, A and dt's softplus are float32
        (float64 when x is) whatever the type of x.

    Raises:
        ValueError: unknown backend; shapes, types, devices or lengths that do not fit.
    """
    direction = Direction(dt, A, Bmat, Cmat, D_skip, dt_bias, state, reverse)
    y, last = _scan(x, z, lengths, [direction], dt_softplus, backend)
    return (y, last[0]) if return_state else y


def selective_scan_bidirectional(
    x: Tensor,
    directions: Sequence[Direction],
    z: Tensor | None = None,
    *,
    dt_softplus: bool = True,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scan the same input in several ways and gate the sum: ``y = (sum_d scan_d(x)) * SiLU(z)``, in one call.

    x and z are read once by the compiled backends, and no flipped copy is made.

    Args:
        x: input that the directions share ``(B, T, E)``.
        directions: two ``Direction``, usually one with ``reverse=True``.
        z: gate ``(B, T, E)``.
        dt_softplus: whether ``dt`` goes through softplus.
        lengths: valid frames ``(B,)``.
        backend: as in ``selective_scan``.

    Returns:
        ``y (B, T, E)`` in x's type.

    Raises:
        ValueError: as ``selective_scan``; or not two directions.
    """
    if len(directions) != 2:
        raise ValueError(f"{NAME}_bidirectional: {len(directions)} directions given, expected 2")
    return _scan(x, z, lengths, directions, dt_softplus, backend)[0]


def _scan(
    x: Tensor, z: Tensor | None, lengths: Tensor | None, directions: Sequence[Direction], softplus: bool, backend: str
) -> tuple[Tensor, tuple[Tensor, ...]]:
    _check(ScanInputs(x, z, None, tuple(directions), softplus))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    widened = tuple(_with_wide_weights(direction, wide) for direction in directions)
    inputs = ScanInputs(x, z, checked_lengths(NAME, lengths, x), widened, softplus)
    if x.numel() == 0:
        states = (d.A.new_zeros(len(x), *d.A.shape) if d.state is None else d.state for d in widened)
        return x * (1 if z is None else z), tuple(states)
    y, last = run_backend(backend, inputs)
    return y.to(x.dtype), last


def _with_wide_weights(direction: Direction, wide: torch.dtype) -> Direction:
    dt, A, Bmat, Cmat, *others, reverse = direction
    return Direction(dt, A.to(wide), Bmat, Cmat, *(v if v is None else v.to(wide) for v in others), reverse)


def _check(inputs: ScanInputs) -> None:
    """Raise ValueError, one line that names the argument, what was given and what is expected."""
    x = inputs.x
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{NAME}: x is {x.dtype} {tuple(x.shape)}, expected floats of shape (B, T, E)")
    num_utterances, num_frames, num_channels = x.shape
    for direction in inputs.directions:
        A = direction.A
        if A.dim() != 2 or A.shape[0] != num_channels or A.shape[1] == 0:
            raise ValueError(f"{NAME}: A has shape {tuple(A.shape)}, expected ({num_channels}, N)")
        over_time = (num_utterances, num_frames, A.shape[1])
        wanted = {
            "z": (inputs.z, tuple(x.shape)),
            "dt": (direction.dt, tuple(x.shape)),
            "Bmat": (direction.Bmat, over_time),
            "Cmat": (direction.Cmat, over_time),
            "D_skip": (direction.D_skip, (num_channels,)),
            "dt_bias": (direction.dt_bias, (num_channels,)),
            "state": (direction.state, (num_utterances, *A.shape)),
            "A": (A, tuple(A.shape)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
            if not tensor.is_floating_point():
                raise ValueError(f"{NAME}: {name} is {tensor.dtype}, expected floats")
            if tensor.device != x.device:
                raise ValueError(f"{NAME}: {name} is on {tensor.device}, expected {x.device}, where x is")
