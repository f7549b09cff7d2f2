"""The published mutual information protocol, reproduced as it ran (arXiv 2409.07273 and its public code).

Per utterance and layer: a critic concat -> 100 -> 100 -> 1 (ReLU), Adam 1e-4, the biased Donsker-Varadhan loss on
minibatches of 128 frames (the incomplete last one dropped), 100 epochs over the utterance's frames; the value is taken
on the training frames, all N of them, with one permutation; values are averaged over utterances.

It is kept because it is published, not because it measures: it has no held-out data, so independent 768-dimensional
noise gets 3 to 5 nats. ``bounds.py`` holds what to believe.
N frames, D width, U utterances, L layers, G problems = U * L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from espnet_mamba.analysis.critics import Adam, ConcatCritic
from espnet_mamba.analysis.sampling import torch_generator


@dataclass(frozen=True)
class MinePaperSettings:
    """The published values; ``minibatch`` 128 is the S3PRL script's, the ESPnet script of the same code has 64."""

    hidden: int = 100
    epochs: int = 100
    minibatch: int = 128
    learning_rate: float = 1e-4
    reuse_critic: bool = False
    problems_at_once: int = 128


@dataclass(frozen=True)
class UtterancePair:
    """The frames of one utterance: reference x (N, Dx), layers y (L, N, Dy), and the name that seeds its draws."""

    name: str
    x: Tensor
    y: Tensor


def mine_paper(pairs: Sequence[UtterancePair], settings: MinePaperSettings, seed: int = 0) -> Tensor:
    """Return the estimate in nats per utterance and layer: (U, L).

    An utterance with fewer frames than the minibatch trains no step (as published): its value is the untrained
    critic's, about 0; leave such utterances out of a mean. With ``reuse_critic`` one critic's weights go through
    all layers of all utterances in turn, layer by layer, as the published scripts ran (only Adam's state begins anew,
    so a layer's value hangs on its place in the row); otherwise every problem starts afresh. What the scripts did
    beside, padded frames among an utterance's own, is for whoever cuts the features: nothing here adds them.
    """
    if not pairs:
        raise ValueError("mine_paper got no utterance; give it at least one")
    num_layers = pairs[0].y.shape[0]
    if settings.reuse_critic:
        return _with_one_critic(pairs, settings, seed)
    values = torch.empty(len(pairs), num_layers)
    # Longest first: the critics that still train are then always the first ones of the batch.
    order = sorted(range(len(pairs)), key=lambda index: -pairs[index].x.shape[0])
    chunk = max(1, settings.problems_at_once // num_layers)
    for start in range(0, len(order), chunk):
        indices = order[start : start + chunk]
        chosen = [pairs[index] for index in indices]
        generators = [
            torch_generator("critic", seed, pair.name, layer) for pair in chosen for layer in range(num_layers)
        ]
        critic = ConcatCritic.create(generators, pairs[0].x.shape[1], pairs[0].y.shape[2], settings.hidden)
        values[indices] = _train_group(chosen, critic, settings, seed)
    return values


def _with_one_critic(pairs: Sequence[UtterancePair], settings: MinePaperSettings, seed: int) -> Tensor:
    width_x, width_y = pairs[0].x.shape[1], pairs[0].y.shape[2]
    critic = ConcatCritic.create([torch_generator("critic", seed)], width_x, width_y, settings.hidden)
    rows = []
    for pair in pairs:
        layers = [UtterancePair(f"{pair.name}/{i}", pair.x, layer[None]) for i, layer in enumerate(pair.y)]
        rows.append(torch.cat([_train_group([layer], critic, settings, seed)[0] for layer in layers]))
    return torch.stack(rows)


def _train_group(
    pairs: Sequence[UtterancePair], critic: ConcatCritic, settings: MinePaperSettings, seed: int
) -> Tensor:
    """Train one critic per (utterance, layer), utterances sorted longest first; return the values (U, L)."""
    num_layers = pairs[0].y.shape[0]
    draws = [_draw_minibatches(pair, settings, seed) for pair in pairs]
    critic.require_grad()
    optimiser = Adam(critic, settings.learning_rate)
    steps = [batches.shape[0] for batches, _ in draws]
    for step in range(max(steps)):
        active = sum(count > step for count in steps)
        picked = [batches[step] for batches, _ in draws[:active]]
        shuffle = torch.stack([marginal[step] for _, marginal in draws[:active]])
        x = torch.stack([pair.x[index] for pair, index in zip(pairs, picked, strict=False)])
        y = torch.cat([pair.y[:, index] for pair, index in zip(pairs, picked, strict=False)])
        # One utterance's frames are not copied for its layers: a product takes them again and again from one place.
        x = x.expand(num_layers, -1, -1) if active == 1 else x.repeat_interleave(num_layers, 0)
        joint, marginal = critic.scores(x, y, shuffle.repeat_interleave(num_layers, 0))
        (-_donsker_varadhan(joint, marginal).sum()).backward()
        optimiser.step(active * num_layers)
    return torch.stack([_value_on_all_frames(pair, critic, u, seed) for u, pair in enumerate(pairs)])


def _draw_minibatches(pair: UtterancePair, settings: MinePaperSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Return frame indices and in-batch permutations of every step: two of (steps, minibatch)."""
    generator = torch_generator("minibatches", seed, pair.name)
    num_frames, size = pair.x.shape[0], settings.minibatch
    per_epoch = num_frames // size
    epochs = [torch.randperm(num_frames, generator=generator)[: per_epoch * size] for _ in range(settings.epochs)]
    batches = torch.cat(epochs).view(-1, size)
    shuffles = [torch.randperm(size, generator=generator) for _ in range(batches.shape[0])]
    return batches, torch.stack(shuffles) if shuffles else batches


def _donsker_varadhan(joint: Tensor, marginal: Tensor) -> Tensor:
    """Return mean T(joint) - ln mean exp T(marginal) per problem: two (G, N) -> (G,)."""
    return joint.mean(1) - (torch.logsumexp(marginal, 1) - math.log(marginal.shape[1]))


@torch.no_grad()
def _value_on_all_frames(pair: UtterancePair, critic: ConcatCritic, position: int, seed: int) -> Tensor:
    num_layers, num_frames = pair.y.shape[:2]
    own = slice(position * num_layers, (position + 1) * num_layers)
    part = ConcatCritic(*[tensor[own] for tensor in critic.tensors()])
    permutation = torch.randperm(num_frames, generator=torch_generator("value", seed, pair.name))
    joint, marginal = part.scores(pair.x.expand(num_layers, -1, -1), pair.y, permutation.expand(num_layers, -1))
    return _donsker_varadhan(joint, marginal)
