"""Many small critics trained side by side: one batched product per layer instead of a loop over problems.

G problems (each with its own weights), N frames, D input width, H hidden width, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_LIMIT = 10.0


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


@dataclass
class SeparableCritic(Parameters):
    """T(x, y) = f(x) . g(y) + u(x) + v(y), each of f, g with a linear path beside one hidden layer.

    All N x N pairs cost one product, so the marginal is estimated from every pair of a batch. u and v are the first
    output column of the two towers and also see x^2: the linear and square paths hold the Gaussian case (a quadratic
    form) exactly, the hidden layer the rest. Scores bend towards +-10, which still can tell 20 nats, so that no single
    pair of frames far from all others owns the sum over the marginal.
    """

    square_x: Tensor  # (G, Dx, 1)
    linear_x: Tensor  # (G, Dx, 1 + E)
    hidden_x: Tensor  # (G, Dx, H)
    hidden_bias_x: Tensor  # (G, 1, H)
    out_x: Tensor  # (G, H, 1 + E)
    square_y: Tensor  # (G, Dy, 1)
    linear_y: Tensor  # (G, Dy, 1 + E)
    hidden_y: Tensor  # (G, Dy, H)
    hidden_bias_y: Tensor  # (G, 1, H)
    out_y: Tensor  # (G, H, 1 + E)

    @classmethod
    def create(
        cls, generators: list[torch.Generator], dim_x: int, dim_y: int, hidden: int, embedding: int
    ) -> SeparableCritic:
        """Return freshly initialised critics, one per generator; their scores begin near 0."""
        parts: list[Tensor] = []
        for dim in (dim_x, dim_y):
            parts += [
                torch.zeros(len(generators), dim, 1),
                linear_weights(generators, (dim, 1 + embedding), dim) * 0.1,
                linear_weights(generators, (dim, hidden), dim) * 3**0.5,
                linear_weights(generators, (1, hidden), 1),
                linear_weights(generators, (hidden, 1 + embedding), hidden) * 0.1,
            ]
        return cls(*parts)

    def scores(self, x: Tensor, y: Tensor) -> Tensor:
        """Return T of every pair: x (G, N, Dx), y (G, M, Dy) -> (G, N, M)."""
        tower_x = _tower(x, self.linear_x, self.hidden_x, self.hidden_bias_x, self.out_x)
        tower_y = _tower(y, self.linear_y, self.hidden_y, self.hidden_bias_y, self.out_y)
        score = torch.bmm(tower_x[:, :, 1:], tower_y[:, :, 1:].transpose(1, 2))
        alone_x = torch.baddbmm(tower_x[:, :, :1], x.square(), self.square_x)
        alone_y = torch.baddbmm(tower_y[:, :, :1], y.square(), self.square_y)
        return _LIMIT * torch.tanh((score + alone_x + alone_y.transpose(1, 2)) / _LIMIT)


def _tower(x: Tensor, linear: Tensor, hidden: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    return torch.baddbmm(torch.bmm(x, linear), torch.baddbmm(bias, x, hidden).relu(), out)


class Adam:
    """Adam over critics of which only the first ``active`` still train (the rest keep weights and moments).

    torch.optim.Adam would go on moving a critic whose gradient became 0; critics of short utterances must stop.
    """

    def __init__(self, parameters: Parameters, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        self.tensors = parameters.tensors()
        self.learning_rate = learning_rate
        self.betas = betas
        self.first = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.second = [torch.zeros_like(tensor) for tensor in self.tensors]
        self.step_number = 0

    @torch.no_grad()
    def step(self, active: int | None = None) -> None:
        """Move the first ``active`` critics (all when None) and clear every gradient."""
        self.step_number += 1
        beta1, beta2 = self.betas
        rate = self.learning_rate / (1.0 - beta1**self.step_number)
        scale = (1.0 - beta2**self.step_number) ** -0.5
        for tensor, first, second in zip(self.tensors, self.first, self.second, strict=True):
            gradient = tensor.grad[:active]
            first[:active].lerp_(gradient, 1.0 - beta1)
            second[:active].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
            denominator = second[:active].sqrt().mul_(scale).add_(1e-8)
            tensor[:active].addcdiv_(first[:active], denominator, value=-rate)
            tensor.grad = None
