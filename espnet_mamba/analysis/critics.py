"""What critics share: first weights, Gaussian scores in closed form, and an optimiser of many networks side by side.

G networks (each with its own weights), F frames, D input width, K pairs of canonical variates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.optim.adam import adam

_CLOSEST = (1.0 - 1e-8) ** 0.5  # a canonical correlation: at most 9 nats a pair


def linear_weights(generators: list[torch.Generator], shape: tuple[int, ...], fan_in: int) -> Tensor:
    """Return (G, *shape) weights from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's own rule for a linear layer."""
    bound = fan_in**-0.5
    draws = [torch.rand(shape, generator=generator) for generator in generators]
    return (2.0 * torch.stack(draws) - 1.0) * bound


@dataclass
class Parameters:
    """A group of tensors with the problem on axis 0; what a critic is made of."""

    def tensors(self) -> list[Tensor]:
        """Return the tensors in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def require_grad(self) -> None:
        """Make every tensor a leaf that collects a gradient."""
        for tensor in self.tensors():
            tensor.requires_grad_(True)


@dataclass(frozen=True)
class GaussianScore:
    """ln p(x, y) / (p(x) p(y)) if x and y were jointly Gaussian, from canonical correlations; the critics start there.

    For the k-th pair of canonical variates u, v of correlation r: (r u v - r^2 (u^2 + v^2) / 2) / (1 - r^2) -
    ln(1 - r^2) / 2. Directions come from all training frames; correlations from the half of the utterances that the
    directions, found again on the other half, did not see, so chance correlations count as none. ``in_sample`` and
    ``honest`` are the Gaussian information (nats) by correlations of the frames that gave the directions and by those
    of the other half: their difference is what the training part is too small to settle.
    """

    map_x: Tensor  # (Dx, K)
    map_y: Tensor  # (Dy, K)
    square: Tensor  # (K,) r / 2: the maps hold the factor r / (1 - r^2) of u v
    constant: float
    in_sample: float
    honest: float

    @property
    def correlations(self) -> Tensor:
        """The canonical correlations that are kept (K,)."""
        return 2.0 * self.square

    @property
    def slack(self) -> float:
        """``in_sample`` minus ``honest``, nats."""
        return self.in_sample - self.honest

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, utterance: Tensor, roots: list[tuple[Tensor, Tensor]] | None = None
    ) -> GaussianScore:
        """Fit to training frames x (F, Dx), y (F, Dy) of mean 0; utterance (F,) numbers, of which two or more.

        ``roots`` are those of x (:func:`half_roots`), when it meets several y.
        """
        roots_x, roots_y = roots or half_roots(x, utterance), half_roots(y, utterance)
        cross = [x[utterance % 2 == parity].double().T @ y[utterance % 2 == parity].double() for parity in (0, 1)]
        cross.append(cross[0] + cross[1])
        fits = [_canonical(a[1], b[1], c) for a, b, c in zip(roots_x, roots_y, cross, strict=True)]
        map_x, map_y, inner = fits[2]
        crossed = [
            _correlations(fits[i][:2], (roots_x[1 - i][0], roots_y[1 - i][0], cross[1 - i]), len(inner)) for i in (0, 1)
        ]
        outer = 0.5 * (crossed[0] + crossed[1])
        # Below twice the deviation of a correlation of independent frames a direction is noise, which adds up.
        outer = torch.where(outer * (len(x) / 2) ** 0.5 > 2.0, outer, 0.0).clamp(max=_CLOSEST)
        kept = outer > 0
        strength = outer[kept] / (1.0 - outer[kept].square())
        honest = _gaussian_nats(outer)
        return cls(
            (map_x[:, kept] * (strength * len(x)).sqrt()).float(),
            (map_y[:, kept] * (strength * len(x)).sqrt()).float(),
            (0.5 * outer[kept]).float(),
            honest,
            _gaussian_nats(inner.clamp(max=_CLOSEST)),
            honest,
        )

    def towers(self, x: Tensor, y: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Return (N, width + 2) of each side, whose products are the scores; zeros fill up to ``width`` pairs."""
        u, v = x @ self.map_x, y @ self.map_y
        alone_x = self.constant - (u.square() @ self.square)[:, None]
        alone_y = -(v.square() @ self.square)[:, None]
        fill = u.new_zeros(len(u), width - u.shape[1])
        one = torch.ones_like(alone_x)
        return torch.cat([u, fill, alone_x, one], 1), torch.cat([v, fill, one, alone_y], 1)


def _gaussian_nats(correlations: Tensor) -> float:
    return float(-0.5 * torch.log1p(-correlations.square()).sum())


def half_roots(features: Tensor, utterance: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (sums of squares (D, D), map to sums of squares of 1 (D, K)) for both halves of the utterances and all.

    Float64. Directions with next to no variance are left out.
    """
    squares = []
    for parity in (0, 1):
        frames = features[utterance % 2 == parity].double()
        squares.append(frames.T @ frames)
    result = []
    for square in (*squares, squares[0] + squares[1]):
        variances, axes = torch.linalg.eigh(square)
        good = variances > 1e-6 * variances[-1].clamp(min=1e-30)
        result.append((square, axes[:, good] / variances[good].sqrt()))
    return result


def _canonical(root_x: Tensor, root_y: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps (Dx, K), (Dy, K) to canonical variates with sums of squares of 1, and the correlations (K,)."""
    product = root_x.T @ cross @ root_y
    count = min(product.shape)
    # The symmetric problem of the smaller side takes a quarter of the time of a singular value decomposition.
    wide = product.shape[0] < product.shape[1]
    if wide:
        product = product.T
    squares, right = torch.linalg.eigh(product.T @ product)
    squares, right = squares.flip(0)[:count], right.flip(1)[:, :count]
    correlations = squares.clamp(min=1e-20).sqrt()
    left = product @ right / correlations
    if wide:
        left, right = right, left
    return root_x @ left, root_y @ right, correlations.clamp(max=1.0)


def _correlations(maps: tuple[Tensor, Tensor], moments: tuple[Tensor, ...], count: int) -> Tensor:
    """Return the correlations (count,) of canonical variates on the frames of ``moments``."""
    a, b = maps
    cross = ((moments[2] @ b) * a).sum(0)
    own = ((moments[0] @ a) * a).sum(0) * ((moments[1] @ b) * b).sum(0)
    found = torch.where(own > 0, cross / own.clamp(min=1e-300).sqrt(), 0.0).clamp(-1.0, 1.0)
    out = found.new_zeros(count)
    out[: len(found[:count])] = found[:count]
    return out


class Adam:
    """Adam over critics of which only the first ``active`` still train (the rest keep weights and moments).

    torch.optim.Adam would go on moving a critic whose gradient became 0; critics of short utterances must stop. One
    fused pass over weights, moments and gradient: step by step they would be read several times, and many critics at
    once are larger than a cache.
    """

    def __init__(self, parameters: Parameters, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.tensors = parameters.tensors()
        self.learning_rate = learning_rate
        self.betas = betas
        self.first = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.second = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.step_numbers = [torch.zeros(()) for _ in self.tensors]

    @torch.no_grad()
    def step(self, active: int | None = None) -> None:
        """Move the first ``active`` critics (all when None) and clear every gradient."""
        adam(
            [tensor[:active] for tensor in self.tensors],
            [tensor.grad[:active] for tensor in self.tensors],
            [first[:active] for first in self.first],
            [second[:active] for second in self.second],
            [],
            self.step_numbers,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        for tensor in self.tensors:
            tensor.grad = None
