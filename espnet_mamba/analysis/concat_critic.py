"""The critic of the published mutual information protocol, and its training: G critics side by side.

One step by hand costs little more than its products: the true and the shuffled pairs share those of W1 (shuffling moves
rows of Wy y), so does the way back, no input needs a gradient, and all weights lie in one vector for Adam in one pass.
The gradient is held against autograd in the tests. G critics on the same x, B frames of a minibatch, D width, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from espnet_mamba.analysis.critics import Adam, Parameters, linear_weights

_relu_backward = torch.ops.aten.threshold_backward.grad_input  # one pass; a product with a mask takes ten times as long


class ConcatCritic(Parameters):
    """T(x, y) = w3 relu(W2 relu(W1 [x; y])): the published critic (docs/papers.md 6: 2D -> H -> H -> 1).

    ``flat`` holds every weight; the fields are views of it. W1 is kept as its two halves: W1 [x; y'] = Wx x + Wy y'.
    weight_x (G, H, Dx), weight_y (G, H, Dy), bias1 (G, H, 1), weight2 (G, H, H), bias2 (G, H, 1), weight3 (G, 1, H),
    bias3 (G, 1, 1).
    """

    def __init__(self, flat: Tensor, groups: int, dim_x: int, dim_y: int, hidden: int) -> None:
        self.flat, self.sizes = flat, (groups, dim_x, dim_y, hidden)
        rows = ((hidden, dim_x), (hidden, dim_y), (hidden, 1), (hidden, hidden), (hidden, 1), (1, hidden), (1, 1))
        parts = flat.split([groups * height * width for height, width in rows])
        views = [part.view(groups, *row) for part, row in zip(parts, rows, strict=True)]
        self.weight_x, self.weight_y, self.bias1, self.weight2, self.bias2, self.weight3, self.bias3 = views

    @classmethod
    def create(cls, generators: list[torch.Generator], dim_x: int, dim_y: int, hidden: int) -> ConcatCritic:
        """Return freshly initialised critics, one per generator."""
        both = dim_x + dim_y
        parts = (
            linear_weights(generators, (dim_x, hidden), both),
            linear_weights(generators, (dim_y, hidden), both),
            linear_weights(generators, (1, hidden), both),
            linear_weights(generators, (hidden, hidden), hidden),
            linear_weights(generators, (1, hidden), hidden),
            linear_weights(generators, (hidden, 1), hidden),
            linear_weights(generators, (1, 1), hidden),
        )
        flat = torch.cat([part.transpose(1, 2).flatten() for part in parts])
        return cls(flat, len(generators), dim_x, dim_y, hidden)

    def over(self, flat: Tensor) -> ConcatCritic:
        """Return critics of the same sizes whose weights (or their gradients) are ``flat``."""
        return ConcatCritic(flat, *self.sizes)

    def tensors(self) -> list[Tensor]:
        """Return the one vector of all weights."""
        return [self.flat]

    def scores(self, x: Tensor, y: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Return T on true pairs and on (x_i, y_order(i)): x (B, Dx), y (G, B, Dy), order (B,) -> two of (G, B)."""
        hidden_x = self.weight_x @ x.T + self.bias1
        hidden_y = self.weight_y @ y.transpose(1, 2)
        pairs = torch.cat([hidden_x + hidden_y, hidden_x + hidden_y[:, :, order]], 2).relu()
        score = (self.weight3 @ (self.weight2 @ pairs + self.bias2).relu() + self.bias3)[:, 0]
        return score[:, : len(x)], score[:, len(x) :]


class ConcatTraining:
    """Adam on the negative Donsker-Varadhan bound of each of G critics, which share x and the minibatches.

    Products are taken in ``precision``; weights, moments and the softmax over the marginal stay in float32.
    """

    def __init__(self, critic: ConcatCritic, minibatch: int, learning_rate: float, precision: torch.dtype) -> None:
        groups, _, _, hidden = critic.sizes
        self.critic, self.optimiser = critic, Adam(critic, learning_rate)
        self.gradient = critic.over(torch.zeros_like(critic.flat))  # bias3's stays 0: the bound ignores a constant
        rounded = precision is not torch.float32
        self.weights = critic.over(critic.flat.to(precision)) if rounded else critic
        self.found = critic.over(torch.zeros_like(self.weights.flat)) if rounded else self.gradient
        work = [critic.flat.new_empty(groups, hidden, 2 * minibatch, dtype=precision) for _ in range(3)]
        self.hidden1, self.hidden2, self.back = work
        # Of the loss by the scores: -1/B of a true pair, its share of the sum of exponentials of a shuffled one.
        self.by_score = torch.full((groups, 1, 2 * minibatch), -1.0 / minibatch, dtype=precision)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        """Move the weights once: x (B, Dx), y (G, B, Dy) in ``precision``, order (B,) long shuffles y."""
        self.differentiate(x, y, order)
        self.critic.flat.grad = self.gradient.flat
        self.optimiser.step()
        if self.weights is not self.critic:
            self.weights.flat.copy_(self.critic.flat)

    @torch.no_grad()
    def differentiate(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        """Put the gradient of the sum of the negative bounds into ``gradient``; arguments as :meth:`step`'s."""
        size = len(x)
        self._forward(x, y, order.expand(*self.hidden1.shape[:2], size))
        weights, found, back = self.weights, self.found, self.back
        torch.bmm(self.by_score, self.hidden2.transpose(1, 2), out=found.weight3)
        torch.mul(weights.weight3.transpose(1, 2), self.by_score, out=back)
        _relu_backward(back, self.hidden2, 0, grad_input=back)
        torch.bmm(back, self.hidden1.transpose(1, 2), out=found.weight2)
        torch.sum(back, 2, keepdim=True, out=found.bias2)
        first = torch.bmm(weights.weight2.transpose(1, 2), back, out=self.hidden2)  # whose values are used up
        _relu_backward(first, self.hidden1, 0, grad_input=first)
        true, shuffled = first[:, :, :size], first[:, :, size:]
        by_x = true + shuffled
        by_y = true + shuffled.gather(2, order.argsort().expand_as(shuffled))
        torch.sum(by_x, 2, keepdim=True, out=found.bias1)
        torch.mm(by_x.flatten(0, 1), x, out=found.weight_x.flatten(0, 1))
        torch.bmm(by_y, y, out=found.weight_y)
        if found is not self.gradient:
            self.gradient.flat.copy_(found.flat)

    def _forward(self, x: Tensor, y: Tensor, order: Tensor) -> None:
        weights, size = self.weights, len(x)
        hidden_x = (weights.weight_x.flatten(0, 1) @ x.T).view_as(order).add_(weights.bias1)
        hidden_y = torch.bmm(weights.weight_y, y.transpose(1, 2))
        torch.add(hidden_x, hidden_y, out=self.hidden1[:, :, :size])
        torch.add(hidden_x, hidden_y.gather(2, order), out=self.hidden1[:, :, size:])
        torch.baddbmm(weights.bias2, weights.weight2, self.hidden1.relu_(), out=self.hidden2).relu_()
        score = torch.bmm(weights.weight3, self.hidden2[:, :, size:])
        self.by_score[:, :, size:] = score.float().softmax(2)
