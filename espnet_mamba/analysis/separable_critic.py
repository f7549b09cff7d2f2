"""The held-out bounds' critics: many small networks side by side, with gradients written out by hand.

T(x, y) = bend(gain * Gaussian score + f(x) . g(y) + u(x) + v(y)), each of f, g a linear path beside a hidden layer. All
N x N pairs cost one product, so the marginal is estimated from every pair of a batch; u and v are the first row of the
two towers. The Gaussian score is closed form (GaussianScore) and the towers begin near 0, so a critic learns only what
is not Gaussian: weights found by gradient alone miss the sharp ridge of strong dependence.
G runs (each with its own frames), E estimators that see the same frames, C = G E critics, N frames, D input width, H
hidden width, M embedding width. Towers are kept with frames last: then the E critics of a run share one product with
their frames, and no copy is made to part their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from espnet_mamba.analysis.critics import linear_weights

LIMIT = 12.0  # nats, of a score


class Side(NamedTuple):
    """The weights of one tower, or their gradients."""

    first: Tensor  # (C, 1 + M + H, D): rows of the linear path, then of the hidden layer
    bias: Tensor  # (C, H, 1)
    out: Tensor  # (C, 1 + M, H)


class Tower(NamedTuple):
    """What one tower made of N frames."""

    hidden: Tensor  # (C, H, N)
    output: Tensor  # (C, 1 + M, N)


@dataclass(frozen=True)
class SeparableCritics:
    """C critics whose weights are views of one vector, which an optimiser moves in one pass."""

    flat: Tensor
    gain: Tensor  # (C, 1, 1)
    side_x: Side
    side_y: Side

    @classmethod
    def empty(cls, critics: int, dim_x: int, dim_y: int, hidden: int, embedding: int) -> SeparableCritics:
        """Return critics (or gradients) whose weights are 0."""
        shapes = [(critics, 1, 1)]
        for dim in (dim_x, dim_y):
            shapes += [(critics, 1 + embedding + hidden, dim), (critics, hidden, 1), (critics, 1 + embedding, hidden)]
        sizes = [math.prod(shape) for shape in shapes]
        flat = torch.zeros(sum(sizes))
        views = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return cls(flat, views[0], Side(*views[1:4]), Side(*views[4:7]))

    @classmethod
    def create(
        cls, generators: list[torch.Generator], estimators: int, dims: tuple[int, int], hidden: int, embedding: int
    ) -> SeparableCritics:
        """Return fresh critics, ``estimators`` the same for each of G generators; their towers' scores begin near 0."""
        critics = cls.empty(len(generators) * estimators, *dims, hidden, embedding)
        critics.gain.fill_(1.0)
        for dim, side in zip(dims, (critics.side_x, critics.side_y), strict=True):
            linear = linear_weights(generators, (dim, 1 + embedding), dim) * 0.1
            into = linear_weights(generators, (dim, hidden), dim) * 3**0.5
            bias = linear_weights(generators, (1, hidden), 1)
            out = linear_weights(generators, (hidden, 1 + embedding), hidden) * 0.1
            for own, drawn in zip(side, (torch.cat([linear, into], 2), bias, out), strict=True):
                own.copy_(drawn.transpose(1, 2).repeat_interleave(estimators, 0))
        return critics

    def copy(self) -> SeparableCritics:
        """Return critics of their own with the same weights."""
        critics, rows, dim_x = self.side_x.first.shape
        hidden = self.side_x.bias.shape[1]
        made = SeparableCritics.empty(critics, dim_x, self.side_y.first.shape[2], hidden, rows - hidden - 1)
        made.flat.copy_(self.flat)
        return made

    @classmethod
    def joined(cls, parts: Sequence[SeparableCritics]) -> SeparableCritics:
        """Return the critics of all parts in a row."""
        if len(parts) == 1:
            return parts[0]
        one = parts[0]
        rows, dim_x = one.side_x.first.shape[1:]
        hidden = one.side_x.bias.shape[1]
        total = sum(len(part.gain) for part in parts)
        made = cls.empty(total, dim_x, one.side_y.first.shape[2], hidden, rows - hidden - 1)
        for own, *others in zip(made.tensors(), *(part.tensors() for part in parts), strict=True):
            torch.cat(others, out=own)
        return made

    def tensors(self) -> list[Tensor]:
        """Return the weights with the critic on axis 0."""
        return [self.gain, *self.side_x, *self.side_y]

    def decay(self, amount: float) -> None:
        """Shrink all weights by a share, but for the gain of the Gaussian score."""
        self.flat[len(self.gain) :].mul_(1.0 - amount)


def tower(side: Side, frames: Tensor) -> Tower:
    """Return the tower's layers: frames (N, D) seen by all critics, or (G, N, D) seen by the critics of each run."""
    critics, rows, dim = side.first.shape
    if frames.dim() == 2:
        first = side.first.view(critics * rows, dim) @ frames.T
    else:
        first = torch.bmm(side.first.view(len(frames), -1, dim), frames.transpose(1, 2))
    first = first.view(critics, rows, -1)
    split = side.out.shape[1]
    hidden = (first[:, split:] + side.bias).relu_()
    return Tower(hidden, torch.baddbmm(first[:, :split], side.out, hidden))


def tower_gradients(side: Side, into: Side, made: Tower, grad: Tensor, frames: Tensor) -> None:
    """Write the gradients of one tower's weights to ``into``.

    grad (C, 1 + M + H, N) holds the gradient of the tower's output in its first rows, and room for the hidden layer's;
    frames (G, N, D).
    """
    split = side.out.shape[1]
    torch.bmm(grad[:, :split], made.hidden.transpose(1, 2), out=into.out)
    hidden = torch.bmm(side.out.transpose(1, 2), grad[:, :split])
    torch.ops.aten.threshold_backward.grad_input(hidden, made.hidden, 0.0, grad_input=grad[:, split:])
    torch.sum(grad[:, split:], 2, keepdim=True, out=into.bias)
    torch.bmm(
        grad.view(len(frames), -1, frames.shape[1]), frames, out=into.first.view(len(frames), -1, frames.shape[2])
    )


def pair_rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (C, 2 + M, N) of both sides whose products over axis 1 are f . g + u + v."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1), torch.cat([torch.ones_like(y[:, :1]), y[:, 1:], y[:, :1]], 1)


def pair_gradients(rows: tuple[Tensor, Tensor], grad: Tensor, into: tuple[Tensor, Tensor]) -> None:
    """Write the gradients of both towers' outputs (C, 1 + M, N), from those of the pairs' sums (C, N, N)."""
    into[0].copy_(torch.bmm(rows[1], grad.transpose(1, 2))[:, :-1])
    right = torch.bmm(rows[0], grad)
    into[1][:, 1:], into[1][:, 0] = right[:, 1:-1], right[:, -1]


def bend(sums: Tensor, slope: Tensor | None, work: Tensor) -> Tensor:
    """Turn sums s into scores s / (1 + (s / LIMIT)^4)^(1/4) in place, ``slope`` into their derivative.

    No single pair of frames far from all others shall own the sum over the marginal. Straight up to a half of the
    limit, where tanh is 8 % off. ``work`` and ``slope`` are of the same shape as ``sums``.
    """
    torch.mul(sums, sums, out=work)
    torch.addcmul(torch.ones(()), work, work, value=LIMIT**-4, out=work)  # 1 + (s / LIMIT)^4
    if slope is None:
        return sums.mul_(work.rsqrt_().sqrt_())
    torch.rsqrt(work, out=slope).sqrt_()
    sums.mul_(slope)
    slope.div_(work)
    return sums
