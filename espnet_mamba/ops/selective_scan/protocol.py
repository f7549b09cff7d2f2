"""What a backend of the selective scan is given and what it returns.

A backend computes one or two directions over the same input in one call: ``y = (sum_d scan_d(x)) * SiLU(z)``. It sees
checked arguments only; types, devices and messages are the interface's business.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Direction(NamedTuple):
    """What one direction of time has of its own. ``A``, ``D_skip``, ``dt_bias`` and ``state`` are never half floats."""

    dt: Tensor  # (B, T, E)
    A: Tensor  # (E, N)
    Bmat: Tensor  # (B, T, N)
    Cmat: Tensor  # (B, T, N)
    D_skip: Tensor | None  # (E,)
    dt_bias: Tensor | None  # (E,)
    state: Tensor | None  # (B, E, N), before the first scanned frame; None is zeros
    reverse: bool  # from each utterance's last valid frame to frame 0


class DirectionGrads(NamedTuple):
    """The gradients of a ``Direction``'s tensors; None where the tensor is None."""

    dt: Tensor
    A: Tensor
    Bmat: Tensor
    Cmat: Tensor
    D_skip: Tensor | None
    dt_bias: Tensor | None
    state: Tensor | None


class ScanInputs(NamedTuple):
    """All arguments of one call."""

    x: Tensor  # (B, T, E)
    z: Tensor | None  # (B, T, E)
    lengths: Tensor | None  # (B,) int64 on x's device, 0 <= lengths <= T
    directions: tuple[Direction, ...]  # one or two
    dt_softplus: bool


class ScanOutputs(NamedTuple):
    """What ``forward`` returns."""

    y: Tensor  # (B, T, E) in x's type, 0 in the padding
    last: tuple[Tensor, ...]  # per direction (B, E, N), the state after its last scanned frame
    kept: tuple[Tensor, ...]  # what ``backward`` wants back; () when ``keep`` was False


class ScanGrads(NamedTuple):
    """What ``backward`` returns: gradients in the types of the inputs, 0 in the padding."""

    x: Tensor
    z: Tensor | None
    directions: tuple[DirectionGrads, ...]


@dataclass(frozen=True)
class Kernels:
    """A backend with a backward pass of its own.

    ``forward(inputs, keep)`` returns ``ScanOutputs``. ``backward(inputs, kept, grad_y, grad_last, grad_z)`` returns
    ``ScanGrads``; ``grad_last`` holds a tensor or None per direction, and ``grad_z`` is where to write z's gradient
    (contiguous channels, any other strides), or None.
    """

    forward: Callable[[ScanInputs, bool], ScanOutputs]
    backward: Callable[
        [ScanInputs, tuple[Tensor, ...], Tensor, tuple[Tensor | None, ...], Tensor | None],
        ScanGrads,
    ]
    dtypes: tuple[torch.dtype, ...]  # types of x, dt, Bmat, Cmat, z that it takes; others are converted to the first
