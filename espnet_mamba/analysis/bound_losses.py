"""Gradients of the held-out bounds' losses in the scores, written out: one pass of exponentials per critic and step.

Losses of one critic, over scores T of N x N pairs, of which d pairs are of different utterances, and their mean
exp T, Z = sum over those of exp T / d:
  infonce  - mean_i (2 T_ii - ln sum_j exp T_ij - ln sum_j exp T_ji) / 2, j = i and frames of other utterances;
  smile    mean_i softplus(-T_ii) + mean over different pairs of softplus(T_ij): a classifier of true and false pairs,
           smooth, and its optimum is the log ratio;
  nwj      Z - mean_i T_ii; dv the same over a running mean of Z in place of the batch's own (MINE's gradient).
G runs; a gradient is (G, N, N).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Which pairs of each run's frames are of different utterances."""

    different: Tensor  # (G, N, N) float, 1 or 0; 0 on the diagonal
    count: Tensor  # (G,)

    @classmethod
    def of(cls, utterance: Tensor) -> Pairs:
        """Return the pairs of frames of ``utterance`` (G, N)."""
        number = utterance.float()  # a difference of floats is made eight at a time, a comparison of integers is not
        different = (number[:, :, None] - number[:, None, :]).abs_().clamp_(max=1.0)
        return cls(different, different.sum((1, 2)))


def smile_gradient(scores: Tensor, pairs: Pairs, grad: Tensor) -> None:
    """Write the gradient of SMILE's classifier to ``grad``; scores (G, N, N)."""
    torch.sigmoid(scores, out=grad)
    true = (diagonal(grad) - 1.0) / scores.shape[1]
    grad.mul_(pairs.different).div_(pairs.count[:, None, None])
    diagonal(grad).copy_(true)


def infonce_gradient(scores: Tensor, pairs: Pairs, grad: Tensor, centred: bool = False) -> None:
    """Write InfoNCE's gradient to ``grad``; ``centred`` adds (ln Z)^2, since InfoNCE leaves T's constant open.

    Scores are bounded, so sums of exponentials need no shift.
    """
    torch.exp(scores, out=grad)
    true, size = diagonal(grad).clone(), scores.shape[1]
    grad.mul_(pairs.different)
    rows, columns = grad.sum(2), grad.sum(1)
    shares = [(0.5 / size) / (total + true) for total in (rows, columns)]
    diagonal_grad = true * (shares[0] + shares[1]) - 1.0 / size
    if centred:
        total = rows.sum(1)
        shares[0] = shares[0] + (2.0 * (total / pairs.count).log() / total)[:, None]
    grad.mul_(shares[0][:, :, None] + shares[1][:, None, :])
    diagonal(grad).copy_(diagonal_grad)


def product_gradient(
    scores: Tensor, pairs: Pairs, grad: Tensor, log_mean: Tensor | None = None, rate: float = 1.0
) -> Tensor:
    """Write NWJ's gradient to ``grad``, or DV's where a running ``log_mean`` (G,) of Z is given, nan at the first step.

    Return the running mean's logarithm after this step, moved by ``rate``.
    """
    torch.exp(scores, out=grad)
    grad.mul_(pairs.different)
    log_batch = (grad.sum((1, 2)) / pairs.count).log()
    scale = pairs.count.reciprocal()
    if log_mean is not None:
        moved = torch.logaddexp(log_mean + math.log(1.0 - rate), log_batch + math.log(rate))
        log_mean = torch.where(torch.isnan(log_mean), log_batch, moved)
        scale = scale * (-log_mean).exp()
    grad.mul_(scale[:, None, None])
    diagonal(grad).fill_(-1.0 / scores.shape[1])
    return log_batch if log_mean is None else log_mean


def diagonal(pairs: Tensor) -> Tensor:
    """Return the true pairs' entries, a view: (G, N, N) -> (G, N)."""
    return pairs.diagonal(dim1=1, dim2=2)
