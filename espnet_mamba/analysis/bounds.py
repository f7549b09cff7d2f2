"""Held-out lower bounds of mutual information: train on some utterances, stop by others, measure on the rest.

Two bounds, each with its own critic, for all layers and seeds at once:
  Donsker-Varadhan  I >= E_joint[T] - ln E_product[exp T], gradient corrected by a running mean (MINE, Belghazi et al.);
  InfoNCE           I >= E[T(x_i, y_i) - ln mean_j exp T(x_i, y_j)], at most ln of the number of candidates.
Negatives are pairs of frames of different utterances (the product of the marginals of the population of utterances; the
frames of one utterance are not independent of each other); at measuring, the true pairs count among them. Features are
standardised with the training frames, so a layer's scale cannot change its value.
F frames, D width, L layers, R seeds, G = 2 * R * L critics, U utterances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.analysis.critics import Adam, SeparableCritic
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, torch_generator
from espnet_mamba.analysis.splits import Part, split_by_utterance

ESTIMATORS = ("dv_heldout", "infonce_heldout")


@dataclass(frozen=True)
class BoundSettings:
    """How the held-out critics are trained; sizes in units, lengths in optimiser steps or frames.

    For the first ``warm_up`` of the steps the DV critics learn by InfoNCE too: DV's own gradient from fresh weights is
    so uneven that at 2 nats a run may stop at half the truth.
    """

    hidden: int = 32
    embedding: int = 32
    steps: int = 400
    batch_frames: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 0.3
    ema_rate: float = 0.01
    warm_up: float = 0.5
    check_every: int = 50
    check_frames: int = 1000
    held_out_frames: int = 4000
    seeds: int = 3
    select_share: float = 0.2
    held_out_share: float = 0.3
    resamples: int = 1000


@dataclass(frozen=True)
class Bound:
    """One held-out bound of one layer, in nats: mean over seeds, 95 % interval over held-out utterances."""

    value: float
    low: float
    high: float
    ceiling: float
    seed_sd: float
    num_frames: int
    num_utts: int


def held_out_bounds(
    x: Tensor, y: Tensor, utterance: Tensor, settings: BoundSettings, seed: int = 0
) -> dict[str, list[Bound]]:
    """Return the bounds between x and every layer of y: estimator -> one :class:`Bound` per layer.

    x (F, Dx), y (L, F, Dy) float; utterance (F,) long numbers. ValueError on non-finite features, and when there are
    too few utterances to split in three (each part needs two, so that pairs of different utterances exist).
    """
    shares = (settings.select_share, settings.held_out_share)
    train, select, held_out = split_by_utterance(
        x, y, utterance, shares, (settings.check_frames, settings.held_out_frames), seed
    )
    critic = _train(train, select, settings, seed)
    return _summarise(critic, held_out, settings, seed)


def _train(train: Part, select: Part, settings: BoundSettings, seed: int) -> SeparableCritic:
    """Train all critics side by side; return each at its best step on the select part."""
    num_layers, runs = train.y.shape[0], settings.seeds
    half = runs * num_layers
    # Draws hang on seed, run and layer: which layers are estimated together changes no value.
    generators = [torch_generator("bound", seed, run, layer) for run in range(runs) for layer in range(num_layers)] * 2
    critic = SeparableCritic.create(generators, train.x.shape[1], train.y.shape[2], settings.hidden, settings.embedding)
    best = _Best(critic)
    critic.require_grad()
    optimiser = Adam(critic, settings.learning_rate)
    draws = [torch_generator("bound batches", seed, run) for run in range(runs)]
    size = min(settings.batch_frames, len(train.utterance))
    log_mean = torch.full((half,), torch.nan)
    for step in range(settings.steps):
        if step % settings.check_every == 0:
            best.update(critic, _select_values(critic, select, half))
        index = torch.stack([torch.randperm(len(train.utterance), generator=draw)[:size] for draw in draws])
        scores = critic.scores(*_gather(train, index, num_layers))
        different = train.utterance[index][:, :, None] != train.utterance[index][:, None, :]
        different = different.repeat_interleave(num_layers, 0)
        if step < settings.steps * settings.warm_up:
            loss = _infonce_loss(scores, different.repeat(2, 1, 1))
        else:
            loss_dv, log_mean = _dv_loss(scores[:half], different, log_mean, settings.ema_rate)
            loss = loss_dv + _infonce_loss(scores[half:], different)
        loss.backward()
        optimiser.learning_rate = 0.5 * settings.learning_rate * (1.0 + math.cos(math.pi * step / settings.steps))
        optimiser.step()
        _decay(critic, optimiser.learning_rate * settings.weight_decay)
    best.update(critic, _select_values(critic, select, half))
    return best.critic


class _Best:
    """Every critic's weights at the step where it did best on the select part."""

    def __init__(self, critic: SeparableCritic) -> None:
        self.critic = SeparableCritic(*[tensor.clone() for tensor in critic.tensors()])
        self.values = torch.full((critic.linear_x.shape[0],), -torch.inf)

    @torch.no_grad()
    def update(self, critic: SeparableCritic, values: Tensor) -> None:
        """Keep the critics whose ``values`` (G,) are better than before."""
        improved = values > self.values
        self.values[improved] = values[improved]
        for kept, current in zip(self.critic.tensors(), critic.tensors(), strict=True):
            kept[improved] = current[improved]


def _gather(part: Part, index: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Return a batch for every critic: index (R, N) -> x (2RL, N, Dx), y (2RL, N, Dy)."""
    x = part.x[index].repeat_interleave(num_layers, 0)
    y = torch.cat([part.y[:, row] for row in index])
    return x.repeat(2, 1, 1), y.repeat(2, 1, 1)


@torch.no_grad()
def _decay(critic: SeparableCritic, amount: float) -> None:
    for tensor in critic.tensors():
        tensor.mul_(1.0 - amount)


def _diagonal(scores: Tensor) -> Tensor:
    return scores.diagonal(dim1=1, dim2=2)


def _dv_loss(scores: Tensor, different: Tensor, log_mean: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss whose gradient is DV's with the running mean in the denominator, and that mean's log.

    scores (G, N, N), different (G, N, N) bool, log_mean (G,), nan before the first step.
    """
    log_batch = ((scores.exp() * different).sum((1, 2)) / different.sum((1, 2))).log()
    detached = log_batch.detach()
    moved = torch.logaddexp(log_mean + math.log(1.0 - rate), detached + math.log(rate))
    log_mean = torch.where(torch.isnan(log_mean), detached, moved)
    return ((log_batch - log_mean).exp() - _diagonal(scores).mean(1)).sum(), log_mean


def _infonce_loss(scores: Tensor, different: Tensor) -> Tensor:
    """Return the summed InfoNCE loss, both ways (each side chooses among the other's): it fixes T up to a constant."""
    return -0.5 * sum(_infonce_terms(scores, different, axis).mean(1).sum() for axis in (1, 2))


def _infonce_terms(scores: Tensor, different: Tensor, axis: int = 2) -> Tensor:
    """Return T_ii - ln mean_j exp T_ij over j = i and the frames j of other utterances: (G, N, N) -> (G, N).

    Scores are bounded (see SeparableCritic), so sums of exponentials need no shift.
    """
    true = _diagonal(scores)
    total = (scores.exp() * different).sum(axis) + true.exp()
    return true - total.log() + (different.sum(axis) + 1).log()


@torch.no_grad()
def _scores_of(critic: SeparableCritic, part: Part, number: int) -> Tensor:
    """Return the scores of all pairs of a part by one critic: (1, F, F); one at a time, since F * F is large."""
    own = SeparableCritic(*[tensor[number : number + 1] for tensor in critic.tensors()])
    return own.scores(part.x[None], part.y[number % part.y.shape[0]][None])


@torch.no_grad()
def _select_values(critic: SeparableCritic, part: Part, half: int) -> Tensor:
    different = part.different()
    count = different.sum() + different.shape[1]
    values = torch.empty(2 * half)
    for number in range(2 * half):
        scores = _scores_of(critic, part, number)
        if number < half:
            true = _diagonal(scores)
            values[number] = true.mean() - (((scores.exp() * different).sum() + true.exp().sum()) / count).log()
        else:
            values[number] = _infonce_terms(scores, different).mean()
    return values


def _held_out_values(critic: SeparableCritic, part: Part, half: int, weights: np.ndarray) -> list[np.ndarray]:
    """Return the values of both bounds for every weighting of the utterances: weights (W, U) -> two of (W, R * L)."""
    different, sizes = part.different(), part.sizes()
    membership = torch.nn.functional.one_hot(part.utterance, part.num_utts).double()  # (F, U)
    dv, rows = [], []
    for number in range(2 * half):
        scores = _scores_of(critic, part, number)
        if number < half:
            true = _diagonal(scores)[0].double()
            blocks = (membership.float().T @ scores[0].exp()).double() @ membership
            dv.append(
                _weighted_dv(*[x.numpy() for x in (true @ membership, true.exp() @ membership, blocks)], sizes, weights)
            )
        else:
            rows.append((_infonce_terms(scores, different)[0].double() @ membership).numpy())
    return [np.stack(dv, 1), (weights @ np.stack(rows, 1)) / (weights @ sizes)[:, None]]


def _summarise(critic: SeparableCritic, part: Part, settings: BoundSettings, seed: int) -> dict[str, list[Bound]]:
    runs, num_layers, sizes = settings.seeds, part.y.shape[0], part.sizes()
    count, utts = len(part.utterance), part.num_utts
    weights = np.vstack([np.ones(utts), bootstrap_weights(utts, settings.resamples, seed)])
    both = _held_out_values(critic, part, runs * num_layers, weights)
    ceilings = (math.log(count), float(sizes @ np.log(count - sizes + 1.0)) / count)
    result = {}
    for name, values, ceiling in zip(ESTIMATORS, both, ceilings, strict=True):
        by_seed = values.reshape(len(weights), runs, num_layers)
        mean = by_seed.mean(1)
        spread = by_seed[0].std(0, ddof=1) if runs > 1 else np.full(num_layers, np.nan)
        result[name] = [
            Bound(
                float(mean[0, layer]),
                *interval(mean[1:, layer].clip(max=ceiling)),
                ceiling,
                float(spread[layer]),
                count,
                utts,
            )
            for layer in range(num_layers)
        ]
    return result


def _weighted_dv(
    joint: np.ndarray, own: np.ndarray, blocks: np.ndarray, sizes: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Return DV for every weighting of the utterances: (W,).

    joint (U,) sums of T over an utterance's true pairs, own (U,) of exp T over them, blocks (U, U) of exp T over all
    pairs of two utterances, weights (W, U). The true pairs count in the marginal too: then the value cannot pass ln n,
    which no lower bound from n frames can be trusted beyond (McAllester and Stratos 2020).
    """
    off = 1.0 - np.eye(len(sizes))
    pairs = np.einsum("wu,uv,wv->w", weights * sizes, off, weights * sizes, optimize=True) + weights @ sizes
    total = np.einsum("wu,uv,wv->w", weights, blocks * off, weights, optimize=True) + weights @ own
    return (weights @ joint) / (weights @ sizes) - np.log(total / pairs)
