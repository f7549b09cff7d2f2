"""The published mutual information protocol, reproduced as it ran (arXiv 2409.07273 and its public code).

Per utterance and layer: a critic concat -> 100 -> 100 -> 1 (ReLU), Adam 1e-4, the biased Donsker-Varadhan loss on
minibatches of 128 frames (the incomplete last one dropped), 100 epochs over the utterance's frames; the value is taken
on the training frames, all N of them, with one permutation; values are averaged over utterances.

It is kept because it is published, not because it measures: it has no held-out data, so independent 768-dimensional
noise gets 3 to 5 nats. ``bounds.py`` holds what to believe.
N frames, D width, U utterances, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from espnet_mamba.analysis.concat_critic import ConcatCritic, ConcatTraining
from espnet_mamba.analysis.sampling import torch_generator

PRECISIONS = ("float32", "bfloat16")
UTTERANCES_OF_A_FILE = 25  # whose features the published script loads at once


@dataclass(frozen=True)
class MinePaperSettings:
    """The published values; ``minibatch`` 128 is the S3PRL script's, the ESPnet script of the same code has 64.

    ``precision`` is that of the products: bfloat16 rounds features, weights and activations to 8 bits, weights are kept
    in float32. ``problems_at_once`` critics are trained side by side in each thread; neither it nor the number of
    threads changes a value by more than rounding.
    """

    hidden: int = 100
    epochs: int = 100
    minibatch: int = 128
    learning_rate: float = 1e-4
    reuse_critic: bool = False
    problems_at_once: int = 12
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"mine_paper: precision {self.precision!r} is not one of: {', '.join(PRECISIONS)}")
        if self.problems_at_once < 1:
            raise ValueError(f"mine_paper: problems_at_once {self.problems_at_once} given, at least 1 expected")


@dataclass(frozen=True)
class UtterancePair:
    """The frames of one utterance: reference x (N, Dx), layers y (L, N, Dy), and the name that seeds its draws."""

    name: str
    x: Tensor
    y: Tensor


def mine_paper(pairs: Sequence[UtterancePair], settings: MinePaperSettings, seed: int = 0) -> Tensor:
    """Return the estimate in nats per utterance and layer: (U, L).

    An utterance with fewer frames than the minibatch trains no step (as published): its value is the untrained
    critic's, about 0; leave such utterances out of a mean. With ``reuse_critic`` one critic's weights go
    through everything in turn, as the published S3PRL script ran: a file of 25 utterances at a time, in it layer by
    layer, in that utterance by utterance. Only Adam's state begins anew, so a layer's value hangs on its place in the
    row. Otherwise every problem starts afresh. What the scripts did
    beside, padded frames among an utterance's own, is for whoever cuts the features: nothing here adds them.
    Raises ValueError when there is no utterance.
    """
    if not pairs:
        raise ValueError("mine_paper got no utterance; give it at least one")
    if settings.reuse_critic:
        return _with_one_critic(pairs, settings, seed)
    num_layers = pairs[0].y.shape[0]
    values = torch.empty(len(pairs), num_layers)

    def train(index: int, first: int) -> None:
        layers = range(first, min(first + settings.problems_at_once, num_layers))
        pair = UtterancePair(pairs[index].name, pairs[index].x, pairs[index].y[layers.start : layers.stop])
        generators = [torch_generator("critic", seed, pair.name, layer) for layer in layers]
        critic = ConcatCritic.create(generators, pair.x.shape[1], pair.y.shape[2], settings.hidden)
        values[index, layers.start : layers.stop] = _train(pair, critic, settings, seed)

    starts = range(0, num_layers, settings.problems_at_once)
    _in_threads(train, [(index, first) for index in range(len(pairs)) for first in starts])
    return values


def _in_threads(work: Callable[..., None], arguments: Sequence[tuple]) -> None:
    """Call ``work`` with each of ``arguments``, as many side by side as PyTorch has threads, with one thread each.

    A few critics fit in a core's cache; all threads at one product would share little work and wait for each other.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, *each) for each in arguments]:
                done.result()
    finally:
        torch.set_num_threads(threads)


def _with_one_critic(pairs: Sequence[UtterancePair], settings: MinePaperSettings, seed: int) -> Tensor:
    width_x, num_layers, width_y = pairs[0].x.shape[1], pairs[0].y.shape[0], pairs[0].y.shape[2]
    critic = ConcatCritic.create([torch_generator("critic", seed)], width_x, width_y, settings.hidden)
    values = torch.empty(len(pairs), num_layers)
    for start in range(0, len(pairs), UTTERANCES_OF_A_FILE):
        for layer in range(num_layers):
            for index, pair in enumerate(pairs[start : start + UTTERANCES_OF_A_FILE], start):
                one = UtterancePair(f"{pair.name}/{layer}", pair.x, pair.y[layer : layer + 1])
                values[index, layer] = _train(one, critic, settings, seed)[0]
    return values


@torch.no_grad()
def _train(pair: UtterancePair, critic: ConcatCritic, settings: MinePaperSettings, seed: int) -> Tensor:
    """Train one critic per layer of ``pair``; return the values (L,)."""
    precision = getattr(torch, settings.precision)
    training = ConcatTraining(critic, settings.minibatch, settings.learning_rate, precision)
    x, y = pair.x.to(precision), pair.y.to(precision)
    for batch, order in zip(*_draw_minibatches(pair, settings, seed), strict=True):
        training.step(x.index_select(0, batch), y.index_select(1, batch), order)
    order = torch.randperm(len(pair.x), generator=torch_generator("value", seed, pair.name))
    return _donsker_varadhan(*critic.scores(pair.x, pair.y, order))


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
    """Return mean T(joint) - ln mean exp T(marginal) per critic: two (G, N) -> (G,)."""
    return joint.mean(1) - (torch.logsumexp(marginal, 1) - math.log(marginal.shape[1]))
