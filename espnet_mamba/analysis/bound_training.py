"""Training of the held-out bounds' critics: all estimators and seeds of a layer side by side.

The four estimators of one seed see the same frames, so they share each product with them; the layers go one after the
other: what all of them keep at once (weights, moments, gradients, Gaussian scores) is larger than a cache, and read
from memory at every step it took longer than the plain loop over layers and seeds.
E estimators, R seeds, C = R E critics (the estimator last), N frames of a batch, L layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.analysis.bound_losses import Pairs, infonce_gradient, product_gradient, smile_gradient
from espnet_mamba.analysis.bound_settings import BoundSettings
from espnet_mamba.analysis.bound_values import Bands, Population, Value, pair_sums
from espnet_mamba.analysis.critics import Adam, Parameters
from espnet_mamba.analysis.sampling import torch_generator
from espnet_mamba.analysis.separable_critic import (
    SeparableCritics,
    bend,
    pair_gradients,
    pair_rows,
    tower,
    tower_gradients,
)
from espnet_mamba.analysis.splits import Part, Problem


@dataclass
class _Flat(Parameters):
    """All weights as the one tensor that the optimiser moves."""

    weights: Tensor


def train_and_measure(
    problem: Problem, settings: BoundSettings, seed: int, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Train the critics of a problem; return their held-out values (E, R, W, L), and crowding (E, R, L).

    Values are for weightings ``weights`` (W, U) of the held-out utterances, by each critic's weights at the step where
    it did best on the select part.
    """
    batches = [_draw_batches(problem, settings, seed, run) for run in range(settings.seeds)]
    select, held_out = Population.of(problem.select), Population.of(problem.held_out, weights)
    shape = (len(settings.estimators), settings.seeds)
    values = np.empty((*shape, len(held_out.weights), len(problem.gaussian)))
    crowding = np.zeros((*shape, len(problem.gaussian)))
    width = max(1, settings.critics_at_once // len(settings.estimators))
    for layer in range(len(problem.gaussian)):
        chunks = [range(start, min(start + width, settings.seeds)) for start in range(0, settings.seeds, width)]
        best = [
            _train(problem, layer, runs, torch.stack([batches[run] for run in runs]), select, settings, seed)
            for runs in chunks
        ]
        critics, shifts = SeparableCritics.joined([one.critics for one in best]), sum((one.shifts for one in best), [])
        base = _bands(*_towers(problem, problem.held_out, layer))
        for number, found in enumerate(_look(critics, problem.held_out, layer, base, held_out, settings, shifts)):
            run, estimator = divmod(number, shape[0])
            values[estimator, run, :, layer], crowding[estimator, run, layer] = found.value, found.crowding
    return values, crowding


def _draw_batches(problem: Problem, settings: BoundSettings, seed: int, run: int) -> Tensor:
    """Draw the frames (steps, N) of one run's batches, the same for all estimators and layers.

    Without repeats in a batch where there are as many frames.
    """
    generator = torch_generator("bound batches", seed, problem.name, run)
    count, size = len(problem.train.utterance), settings.batch_frames
    if count < size:
        return torch.stack([torch.randint(count, (size,), generator=generator) for _ in range(settings.steps)])
    return torch.stack([torch.randperm(count, generator=generator)[:size] for _ in range(settings.steps)])


def _towers(problem: Problem, part: Part, layer: int) -> tuple[Tensor, Tensor]:
    gaussian = problem.gaussian[layer]
    return gaussian.towers(part.x, part.y[layer], len(gaussian.square))


def _bands(left: Tensor, right: Tensor) -> Bands:
    return lambda band: left[band] @ right.T


def _train(
    problem: Problem,
    layer: int,
    runs: range,
    batches: Tensor,
    select: Population,
    settings: BoundSettings,
    seed: int,
) -> _Best:
    """Train the critics of some runs on one layer; ``batches`` (G, steps, N) are the numbers of their frames."""
    part, towers = problem.train, _towers(problem, problem.train, layer)
    left, right = _towers(problem, problem.select, layer)
    select_base = (left @ right.T).__getitem__  # needed at every look
    # Draws hang on seed, name, run and layer: what is estimated together changes no value.
    generators = [torch_generator("bound", seed, problem.name, run, layer) for run in runs]
    sizes = ((part.x.shape[1], part.y.shape[2]), settings.hidden, settings.embedding)
    critics = SeparableCritics.create(generators, len(settings.estimators), *sizes)
    step = _Step(critics, settings, batches.shape[2])
    optimiser, best = Adam(_Flat(critics.flat), settings.learning_rate), _Best(critics)
    for number in range(settings.steps + 1):
        if number % settings.check_every == 0 or number == settings.steps:
            best.update(critics, _look(critics, problem.select, layer, select_base, select, settings))
        if number == settings.steps:
            return best
        index = batches[:, number]
        x, y, left, right = (_rows(side, index) for side in (part.x, part.y[layer], *towers))
        step.gradients(x, y, torch.bmm(left, right.transpose(1, 2)), Pairs.of(part.utterance[index]), number)
        critics.flat.grad = step.into.flat
        optimiser.learning_rate = 0.5 * settings.learning_rate * (1.0 + math.cos(math.pi * number / settings.steps))
        optimiser.step()
        critics.decay(optimiser.learning_rate * settings.weight_decay)
    raise AssertionError("unreachable")


def _rows(frames: Tensor, index: Tensor) -> Tensor:
    """Return frames[index], (F, D) and (G, N) -> (G, N, D); indexing with a matrix would take twice the time."""
    return frames.index_select(0, index.flatten()).view(*index.shape, -1)


class _Step:
    """Gradients of one batch, written by hand: through autograd the N x N scores are read and written twice as often.

    Each estimator's scores go through all of it before the next one's, so that they stay in the cache.
    """

    def __init__(self, critics: SeparableCritics, settings: BoundSettings, size: int) -> None:
        self.critics, self.settings = critics, settings
        estimators = len(settings.estimators)
        self.groups = len(critics.gain) // estimators
        self.into = critics.copy()
        self.log_mean = torch.full((self.groups,), torch.nan)
        self.buffers = torch.empty(4, self.groups, size, size)
        self.tower_grads = torch.empty(2, *critics.side_x.first.shape[:2], size)

    def gradients(self, x: Tensor, y: Tensor, base: Tensor, pairs: Pairs, step: int) -> None:
        """Write the gradients of all weights: x (G, N, Dx), y (G, N, Dy), base (G, N, N) the Gaussian scores."""
        critics, count = self.critics, len(self.settings.estimators)
        made = tower(critics.side_x, x), tower(critics.side_y, y)
        rows = pair_rows(made[0].output, made[1].output)
        split = made[0].output.shape[1]
        scores, slope, work, grad = self.buffers
        for number, name in enumerate(self.settings.estimators):
            own = slice(number, None, count)  # this estimator's critic of every run
            mine = rows[0][own], rows[1][own]
            torch.mul(base, critics.gain[own], out=scores)
            scores.baddbmm_(mine[0].transpose(1, 2), mine[1])
            bend(scores, slope, work)
            self._loss(name, scores, pairs, grad, step)
            grad.mul_(slope)
            self.into.gain[own, 0, 0] = torch.mul(grad, base, out=work).sum((1, 2))
            pair_gradients(mine, grad, (self.tower_grads[0, own, :split], self.tower_grads[1, own, :split]))
        tower_gradients(critics.side_x, self.into.side_x, made[0], self.tower_grads[0], x)
        tower_gradients(critics.side_y, self.into.side_y, made[1], self.tower_grads[1], y)

    def _loss(self, name: str, scores: Tensor, pairs: Pairs, grad: Tensor, step: int) -> None:
        if name == "smile_heldout":
            smile_gradient(scores, pairs, grad)
        elif name == "infonce_heldout" or step < self.settings.steps * self.settings.warm_up:
            infonce_gradient(scores, pairs, grad, centred=name == "nwj_heldout")
        elif name == "dv_heldout":
            self.log_mean = product_gradient(scores, pairs, grad, self.log_mean, self.settings.ema_rate)
        else:
            product_gradient(scores, pairs, grad)


class _Best:
    """Every critic's weights at the step where it did best on the select part, and ln of its mean over the product."""

    def __init__(self, critics: SeparableCritics) -> None:
        self.critics = critics.copy()
        self.values = [-math.inf] * len(critics.gain)
        self.shifts = [0.0] * len(critics.gain)

    def update(self, critics: SeparableCritics, found: list[Value]) -> None:
        """Keep the critics whose values are better than before."""
        for number, value in enumerate(found):
            if value.value[0] > self.values[number]:
                self.values[number], self.shifts[number] = float(value.value[0]), value.log_mean
                for kept, current in zip(self.critics.tensors(), critics.tensors(), strict=True):
                    kept[number] = current[number]


def _look(
    critics: SeparableCritics,
    part: Part,
    layer: int,
    base: Bands,
    population: Population,
    settings: BoundSettings,
    shifts: list[float] | None = None,
) -> list[Value]:
    """Return the critics' values on a part; ``shifts`` (C,) are taken off NWJ's scores."""
    names = settings.estimators * (len(critics.gain) // len(settings.estimators))
    clip = torch.tensor([settings.smile_clip if name == "smile_heldout" else math.inf for name in names])
    sums = pair_sums(critics, (part.x, part.y[layer]), base, population.utterance, clip)
    return [
        population.value(name, sums, number, None if shifts is None else shifts[number])
        for number, name in enumerate(names)
    ]
