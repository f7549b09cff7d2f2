"""Many small critics trained side by side: one batched product per layer instead of a loop over problems.

G problems (each with its own weights), N frames, D input width, H hidden width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam

LIMIT = 12.0  # nats, of a score
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


@dataclass
class ConcatCritic(Parameters):
    """T(x, y) = W3 relu(W2 relu(W1 [x; y])): the published critic (docs/papers.md 6: 2D -> H -> H -> 1).

    W1 is kept as its two halves, so that shuffled pairs reuse both products: W1 [x; y'] = Wx x + Wy y'.
    """

    weight_x: Tensor  # (G, Dx, H)
    weight_y: Tensor  # (G, Dy, H)
    bias1: Tensor  # (G, 1, H)
    weight2: Tensor  # (G, H, H)
    bias2: Tensor  # (G, 1, H)
    weight3: Tensor  # (G, H, 1)
    bias3: Tensor  # (G, 1, 1)

    @classmethod
    def create(cls, generators: list[torch.Generator], dim_x: int, dim_y: int, hidden: int) -> ConcatCritic:
        """Return freshly initialised critics, one per generator."""
        both = dim_x + dim_y
        return cls(
            linear_weights(generators, (dim_x, hidden), both),
            linear_weights(generators, (dim_y, hidden), both),
            linear_weights(generators, (1, hidden), both),
            linear_weights(generators, (hidden, hidden), hidden),
            linear_weights(generators, (1, hidden), hidden),
            linear_weights(generators, (hidden, 1), hidden),
            linear_weights(generators, (1, 1), hidden),
        )

    def scores(self, x: Tensor, y: Tensor, permutation: Tensor) -> tuple[Tensor, Tensor]:
        """Return T on true pairs and on (x_i, y_permutation(i)).

        x (G, N, Dx), y (G, N, Dy), permutation (G, N) long -> two of (G, N).
        """
        groups = x.shape[0]
        hidden_x = torch.baddbmm(self.bias1[:groups], x, self.weight_x[:groups])
        hidden_y = torch.bmm(y, self.weight_y[:groups])
        shuffled = hidden_y.gather(1, permutation[:, :, None].expand_as(hidden_y))
        pair = torch.cat([hidden_x + hidden_y, hidden_x + shuffled], dim=1).relu_()
        pair = torch.baddbmm(self.bias2[:groups], pair, self.weight2[:groups]).relu_()
        score = torch.baddbmm(self.bias3[:groups], pair, self.weight3[:groups])[:, :, 0]
        return score[:, : x.shape[1]], score[:, x.shape[1] :]


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


@dataclass
class SeparableCritic(Parameters):
    """T(x, y) = gain * Gaussian score + f(x) . g(y) + u(x) + v(y), each of f, g a linear path beside a hidden layer.

    All N x N pairs cost one product, so the marginal is estimated from every pair of a batch. u and v are the first
    output column of the two towers. The Gaussian score is closed form (GaussianScore) and the towers begin near 0, so a
    critic learns only what is not Gaussian: weights found by gradient alone miss the sharp ridge of strong dependence.
    Scores bend towards +-12, so that no single pair of frames far from all others owns the sum over the marginal.
    """

    gain: Tensor  # (G, 1, 1)
    linear_x: Tensor  # (G, Dx, 1 + E)
    hidden_x: Tensor  # (G, Dx, H)
    hidden_bias_x: Tensor  # (G, 1, H)
    out_x: Tensor  # (G, H, 1 + E)
    linear_y: Tensor  # (G, Dy, 1 + E)
    hidden_y: Tensor  # (G, Dy, H)
    hidden_bias_y: Tensor  # (G, 1, H)
    out_y: Tensor  # (G, H, 1 + E)

    @classmethod
    def create(
        cls, generators: list[torch.Generator], dim_x: int, dim_y: int, hidden: int, embedding: int
    ) -> SeparableCritic:
        """Return freshly initialised critics, one per generator; their towers' scores begin near 0."""
        parts = [torch.ones(len(generators), 1, 1)]
        for dim in (dim_x, dim_y):
            parts += [
                linear_weights(generators, (dim, 1 + embedding), dim) * 0.1,
                linear_weights(generators, (dim, hidden), dim) * 3**0.5,
                linear_weights(generators, (1, hidden), 1),
                linear_weights(generators, (hidden, 1 + embedding), hidden) * 0.1,
            ]
        return cls(*parts)

    def scores(self, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
        """Return T of every pair: x (G, N, Dx), y (G, M, Dy), base (G, N, M) the Gaussian score -> (G, N, M)."""
        tower_x = _tower(x, self.linear_x, self.hidden_x, self.hidden_bias_x, self.out_x)
        tower_y = _tower(y, self.linear_y, self.hidden_y, self.hidden_bias_y, self.out_y)
        score = torch.baddbmm(self.gain * base, tower_x[:, :, 1:], tower_y[:, :, 1:].transpose(1, 2))
        score = score + tower_x[:, :, :1] + tower_y[:, :, :1].transpose(1, 2)
        fourth = (score / LIMIT).square().square()
        return score * (1.0 + fourth).rsqrt().sqrt()  # straight up to a half of the limit, where tanh is 8 % off

    def one(self, number: int) -> SeparableCritic:
        """Return the critic of that number alone."""
        return SeparableCritic(*[tensor[number : number + 1] for tensor in self.tensors()])

    @torch.no_grad()
    def decay(self, amount: float) -> None:
        """Shrink all weights by a share, but for the gain of the Gaussian score."""
        for tensor in self.tensors()[1:]:
            tensor.mul_(1.0 - amount)


def _tower(x: Tensor, linear: Tensor, hidden: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return torch.baddbmm(torch.bmm(x, linear), torch.baddbmm(bias, x, hidden).relu(), out)


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


def diagonal(scores: Tensor) -> Tensor:
    """Return the scores of the true pairs: (G, N, N) -> (G, N)."""
    return scores.diagonal(dim1=1, dim2=2)


def infonce_terms(scores: Tensor, different: Tensor, axis: int = 2) -> Tensor:
    """Return T_ii - ln mean_j exp T_ij over j = i and the frames j of other utterances: (G, N, N) -> (G, N).

    Scores are bounded (see SeparableCritic), so sums of exponentials need no shift.
    """
    true = diagonal(scores)
    total = (scores.exp() * different).sum(axis) + true.exp()
    return true - total.log() + (different.sum(axis) + 1).log()


def infonce_value(scores: Tensor, utterance: Tensor, weights: np.ndarray) -> np.ndarray:
    """Return InfoNCE for every weighting of the utterances: scores (F, F), utterance (F,), weights (W, U) -> (W,)."""
    member = _membership(utterance, weights)
    terms = infonce_terms(scores[None], (utterance[:, None] != utterance[None, :])[None])[0].double()
    return weights @ (terms @ member).numpy() / (weights @ member.sum(0).numpy())


def expectations(
    scores: Tensor, utterance: Tensor, weights: np.ndarray, clip: float | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return E_joint[T] and ln E_product[exp T] for every weighting of the utterances, and the crowding.

    scores (F, F), utterance (F,), weights (W, U) -> two of (W,). The product's pairs are those of different utterances
    and the true ones; ``clip`` limits T there to +-clip. Crowding is the share of the true pairs in that mean.
    """
    member = _membership(utterance, weights)
    sizes, off = member.sum(0).numpy(), 1.0 - np.eye(member.shape[1])
    ratio = (scores if clip is None else scores.clamp(-clip, clip)).exp()
    own = (ratio.diagonal().double() @ member).numpy()
    blocks = ((member.float().T @ ratio).double() @ member).numpy() * off
    both, total = weights * sizes, weights @ sizes
    pairs = np.einsum("wu,uv,wv->w", both, off, both, optimize=True) + total
    sums = np.einsum("wu,uv,wv->w", weights, blocks, weights, optimize=True) + weights @ own
    joint = weights @ (scores.diagonal().double() @ member).numpy() / total
    return joint, np.log(sums / pairs), float(own.sum() / (own.sum() + blocks.sum()))


def _membership(utterance: Tensor, weights: np.ndarray) -> Tensor:
    return torch.nn.functional.one_hot(utterance, weights.shape[1]).double()  # (F, U)
