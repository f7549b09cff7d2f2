"""Held-out estimates of mutual information: train on some utterances, stop by others, measure on the rest.

Four of them, each with its own critic T, for all layers, seeds (and utterances) at once:
  dv       I >= E_joint[T] - ln E_product[exp T] (Donsker-Varadhan), gradient corrected by a running mean (MINE,
           Belghazi et al. 2018);
  infonce  I >= E[T(x_i, y_i) - ln mean_j exp T(x_i, y_j)] (van den Oord et al. 2018), at most ln of the candidates;
  smile    DV with exp T clipped to exp(+-tau) in the second term, T trained as a classifier (Song and Ermon 2020): less
           variance, and no bound any more;
  nwj      I >= 1 + E_joint[T] - E_product[exp T] (Nguyen, Wainwright and Jordan 2010).
Negatives are pairs of frames of different utterances (the product of the marginals of the population of utterances; the
frames of one utterance are not independent of each other); at measuring, the true pairs count among them: then no value
can pass ln n, which no lower bound from n frames can be trusted beyond (McAllester and Stratos 2020); SMILE's is cut
there.
F frames, D width, L layers, R seeds, P problems (1 pooled, else utterances), E = 4 estimators, G = E P R L critics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import t as student_t
from torch import Tensor

from espnet_mamba.analysis.critics import (
    Adam,
    SeparableCritic,
    diagonal,
    expectations,
    infonce_terms,
    infonce_value,
)
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, torch_generator
from espnet_mamba.analysis.splits import Part, Problem, blocks_of, gaussian_towers
from espnet_mamba.analysis.whitening import KINDS

ESTIMATORS = ("dv_heldout", "infonce_heldout", "smile_heldout", "nwj_heldout")
_CROWDED = 0.25  # share of the true pairs in the product's mean, from which a value falls short by more than a tenth


@dataclass(frozen=True)
class BoundSettings:
    """How the held-out critics are trained.

    For the first ``warm_up`` of the steps the DV and NWJ critics learn by InfoNCE too: their own gradient from fresh
    weights is so uneven that at 2 nats a run may stop at half the truth.
    """

    estimators: tuple[str, ...] = ESTIMATORS
    hidden: int = 32  # units of each tower
    embedding: int = 32  # width of the towers' outputs
    steps: int = 200  # optimiser steps
    batch_frames: int = 256  # all pairs of them are scored
    learning_rate: float = 5e-3  # of Adam, to 0 by a cosine
    weight_decay: float = 0.3  # decoupled, times the learning rate
    ema_rate: float = 0.01  # of the running mean in DV's gradient
    smile_clip: float = 5.0  # nats: tau
    warm_up: float = 0.5  # share of the steps
    check_every: int = 50  # steps from one look at the select part to the next
    check_frames: int = 1000  # most frames of the select part
    held_out_frames: int = 4000  # most frames of the held-out part; the ceiling is their logarithm
    seeds: int = 5  # critics per layer and estimator
    select_share: float = 0.2  # share of the utterances that choose the step
    held_out_share: float = 0.3  # share of the utterances that give the value
    resamples: int = 1000  # of the bootstrap over utterances
    whitening: str = "standardise"  # or pca: principal components of the training frames, whitened
    components: int | None = None  # number, of pca; all when None
    block_frames: int = 25  # per utterance: frames in a row that go to one part
    guard_frames: int = 2  # per utterance: frames left out at both ends of a block
    critics_at_once: int = 300  # per utterance: in one batched product; does not change a value

    @property
    def split(self) -> tuple[tuple[float, float], tuple[int, int], tuple[str, int | None]]:
        """Shares and most frames of the select and held-out parts, and (kind, components) of the whitening."""
        shares, most = (self.select_share, self.held_out_share), (self.check_frames, self.held_out_frames)
        return shares, most, (self.whitening, self.components)

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimators", tuple(self.estimators))
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise ValueError(f"estimators: {name!r} is not one of: {' '.join(ESTIMATORS)}")
        if self.whitening not in KINDS:
            raise ValueError(f"whitening: {self.whitening!r} is not one of: {' '.join(KINDS)}")


@dataclass(frozen=True)
class Bound:
    """One held-out value of one layer, in nats: mean over seeds, 95 % interval over held-out utterances.

    ``slack`` (nats) is how much more linear information the training frames show than frames that gave no direction do
    (GaussianScore): what lies between can be neither claimed nor excluded with so few frames for the width.
    ``crowding`` is the share of the true pairs in the mean over the product (DV, NWJ), towards 1 at the ceiling.
    """

    value: float
    low: float
    high: float
    ceiling: float
    seed_sd: float
    num_frames: int
    num_utts: int
    slack: float = 0.0
    crowding: float = 0.0

    @property
    def flag(self) -> str:
        """Why the truth may be far above the value: ``ceiling``, ``few_frames``, or empty.

        ``ceiling``: the value is at its ceiling, or the true pairs crowd the product's mean: the ceiling already bends
        it. ``few_frames``: ``slack`` is more than a tenth of the value and than 0.05 nats.
        """
        if at_ceiling(self.value, self.ceiling) or self.crowding > _CROWDED:
            return "ceiling"
        return "few_frames" if self.slack > max(0.05, 0.1 * self.value) else ""


def at_ceiling(value: float, ceiling: float) -> bool:
    """Return whether ``value`` is within 5 % of ``ceiling`` or above: bounds bend before they touch it."""
    return value >= 0.95 * ceiling


def held_out_bounds(
    x: Tensor, y: Tensor, utterance: Tensor, settings: BoundSettings, seed: int = 0
) -> dict[str, list[Bound]]:
    """Return the bounds between x and every layer of y, frames of all utterances pooled: estimator -> one per layer.

    x (F, Dx), y (L, F, Dy) float; utterance (F,) long numbers. ValueError on non-finite features, and when there are
    too few utterances to split in three (each part needs two, so that pairs of different utterances exist).
    """
    problem = Problem.create("", x, y, utterance, *settings.split, seed)
    critic = _train([problem], settings, seed)
    part, sizes = problem.held_out, problem.held_out.sizes()
    weights = np.vstack([np.ones(part.num_utts), bootstrap_weights(part.num_utts, settings.resamples, seed)])
    values, crowding = _measure(critic, [problem], settings, weights)
    return {
        name: [
            _summary(
                value[:, :, layer],
                _ceiling(name, sizes),
                len(part.utterance),
                part.num_utts,
                gaussian.slack,
                crowd[layer],
            )
            for layer, gaussian in enumerate(problem.gaussian)
        ]
        for name, value, crowd in zip(settings.estimators, values[:, 0], crowding.mean((1, 2)).tolist(), strict=True)
    }


def _summary(values: np.ndarray, ceiling: float, frames: int, utts: int, slack: float, crowding: float) -> Bound:
    """Summarise one layer's values (R, W), of which the first of W is the value itself and the rest resamples."""
    mean = values.mean(0)
    spread = float(values[:, 0].std(ddof=1)) if len(values) > 1 else float("nan")
    low, high = interval(mean[1:].clip(max=ceiling))
    wider = interval_factor(utts)
    low, high = mean[0] - wider * (mean[0] - low), min(ceiling, mean[0] + wider * (high - mean[0]))
    return Bound(min(float(mean[0]), ceiling), float(low), float(high), ceiling, spread, frames, utts, slack, crowding)


def interval_factor(utts: int) -> float:
    """How much wider than its percentiles a 95 % bootstrap interval over few utterances has to be: Student's t for the
    normal distribution, and the bootstrap's variance, which divides by U, for that which divides by U - 1."""
    return float(student_t.ppf(0.975, utts - 1) / 1.96 * math.sqrt(utts / (utts - 1))) if utts > 1 else math.nan


def _ceiling(estimator: str, sizes: np.ndarray) -> float:
    """Return ln n of the frames, for InfoNCE the mean of ln K of each frame's candidates; sizes (U,)."""
    count = sizes.sum()
    if estimator == "infonce_heldout":
        return float(sizes @ np.log(count - sizes + 1.0)) / count
    return math.log(count)


def per_utterance_bounds(
    names: Sequence[str], x: Sequence[Tensor], y: Sequence[Tensor], settings: BoundSettings, seed: int = 0
) -> dict[str, list[Bound]]:
    """Return the mean over utterances of each utterance's own bound (the published average, held out): as above.

    x holds (N, Dx), y (L, N, Dy) per utterance. An utterance is split by blocks in time, and negatives are pairs of
    different blocks: what is constant in an utterance, its speaker and its channel, counts as nothing here. Utterances
    with fewer than 6 blocks are left out; ValueError when all are. The interval is over utterances.
    """
    problems, width = [], math.ceil(settings.critics_at_once / (len(settings.estimators) * settings.seeds * len(y[0])))
    for name, one, layers in zip(names, x, y, strict=True):
        frames, block = blocks_of(len(one), settings.block_frames, settings.guard_frames)
        if len(block) and int(block[-1]) >= 5:
            problems.append(Problem.create(name, one[frames], layers[:, frames], block, *settings.split, seed))
    if not problems:
        raise ValueError(
            f"mutual information per utterance: none has {6 * settings.block_frames} frames; lower block_frames"
        )
    chunks = [problems[start : start + width] for start in range(0, len(problems), width)]
    found = [_measure(_train(chunk, settings, seed), chunk, settings) for chunk in chunks]
    values = np.concatenate([values for values, _ in found], 1)[:, :, :, 0]  # (E, P, R, L)
    crowding = np.concatenate([crowding for _, crowding in found], 1).mean((1, 2)).tolist()
    weights = np.vstack([np.ones(len(problems)), bootstrap_weights(len(problems), settings.resamples, seed)])
    means = np.einsum("wp,eprl->erwl", weights / len(problems), values)
    slack = np.mean([[gaussian.slack for gaussian in problem.gaussian] for problem in problems], 0).tolist()
    result: dict[str, list[Bound]] = {}
    for name, value, crowd in zip(settings.estimators, means, crowding, strict=True):
        ceiling = float(np.mean([_ceiling(name, problem.held_out.sizes()) for problem in problems]))
        frames = sum(len(problem.held_out.utterance) for problem in problems)
        result[name] = [
            _summary(value[:, :, layer], ceiling, frames, len(problems), slack[layer], crowd[layer])
            for layer in range(value.shape[2])
        ]
    return result


def _train(problems: Sequence[Problem], settings: BoundSettings, seed: int) -> SeparableCritic:
    """Train all critics side by side; return each at its best step on the select part. Order: (E, P, R, L)."""
    first, runs = problems[0].train, settings.seeds
    keys = [(problem.name, run, layer) for problem in problems for run in range(runs) for layer in range(len(first.y))]
    # Draws hang on seed, name, run and layer: what is estimated together changes no value.
    generators = [torch_generator("bound", seed, *key) for _ in settings.estimators for key in keys]
    critic = SeparableCritic.create(generators, first.x.shape[1], first.y.shape[2], settings.hidden, settings.embedding)
    best, select = _Best(critic), [problem.select for problem in problems]
    critic.require_grad()
    optimiser = Adam(critic, settings.learning_rate)
    batches = _Batches(problems, settings, seed)
    log_mean = torch.full((len(keys),), torch.nan)
    for step in range(settings.steps):
        if step % settings.check_every == 0:
            best.update(critic, _values(critic, problems, select, settings)[0])
        x, y, base, different = batches.draw()
        scores = critic.scores(x, y, base).unflatten(0, (len(settings.estimators), len(keys)))
        warm = step < settings.steps * settings.warm_up
        loss = scores.new_zeros(())
        for name, score in zip(settings.estimators, scores, strict=True):
            if name == "dv_heldout" and not warm:
                part, log_mean = _dv_loss(score, different, log_mean, settings.ema_rate)
            else:
                part = _loss(name, score, different, warm)
            loss = loss + part
        loss.backward()
        optimiser.learning_rate = 0.5 * settings.learning_rate * (1.0 + math.cos(math.pi * step / settings.steps))
        optimiser.step()
        critic.decay(optimiser.learning_rate * settings.weight_decay)
    best.update(critic, _values(critic, problems, select, settings)[0])
    return best.critic


class _Batches:
    """Draws the frames of every step, the same for all estimators and layers of a (problem, run)."""

    def __init__(self, problems: Sequence[Problem], settings: BoundSettings, seed: int) -> None:
        self.settings, self.num_layers = settings, len(problems[0].train.y)
        self.draws = [
            (problem.train, torch_generator("bound batches", seed, problem.name, run), number)
            for number, problem in enumerate(problems)
            for run in range(settings.seeds)
        ]
        self.towers = gaussian_towers(problems, [problem.train for problem in problems])

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x (G, N, Dx), y (G, N, Dy), Gaussian scores (G, N, N), and (P R L, N, N): which pairs differ."""
        x, y, left, right, different = ([] for _ in range(5))
        for part, generator, number in self.draws:
            index = _draw_frames(len(part.utterance), self.settings.batch_frames, generator)
            x.append(part.x[index].expand(self.num_layers, -1, -1))
            y.append(part.y[:, index])
            left.append(self.towers[number][0][:, index])
            right.append(self.towers[number][1][:, index])
            owner = part.utterance[index]
            different.append((owner[:, None] != owner[None, :]).expand(self.num_layers, -1, -1))
        base = torch.bmm(torch.cat(left), torch.cat(right).transpose(1, 2))
        repeat = (len(self.settings.estimators), 1, 1)
        return torch.cat(x).repeat(repeat), torch.cat(y).repeat(repeat), base.repeat(repeat), torch.cat(different)


def _draw_frames(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``size`` frames, without repeats where there are as many."""
    if count >= size:
        return torch.randperm(count, generator=generator)[:size]
    return torch.randint(count, (size,), generator=generator)


class _Best:
    """Every critic's weights at the step where it did best on the select part."""

    def __init__(self, critic: SeparableCritic) -> None:
        self.critic = SeparableCritic(*[tensor.clone() for tensor in critic.tensors()])
        self.values = torch.full((critic.gain.shape[0],), -torch.inf, dtype=torch.float64)

    @torch.no_grad()
    def update(self, critic: SeparableCritic, found: np.ndarray) -> None:
        """Keep the critics whose values, ``found`` (E, P, R, 1, L), are better than before."""
        values = torch.from_numpy(found).flatten()
        improved = values > self.values
        self.values[improved] = values[improved]
        for kept, current in zip(self.critic.tensors(), critic.tensors(), strict=True):
            kept[improved] = current[improved]


def _loss(name: str, scores: Tensor, different: Tensor, warm: bool) -> Tensor:
    """Return the summed loss of one estimator: scores, different (G, N, N)."""
    if name == "smile_heldout":  # a classifier of true and false pairs: smooth, and its optimum is the log ratio
        wrong = (F.softplus(scores) * different).sum((1, 2)) / different.sum((1, 2))
        return (F.softplus(-diagonal(scores)).mean(1) + wrong).sum()
    if warm or name == "infonce_heldout":
        loss = -0.5 * sum(infonce_terms(scores, different, axis).mean(1).sum() for axis in (1, 2))
        if name == "nwj_heldout":  # InfoNCE leaves T's constant open, NWJ needs it
            loss = loss + _log_mean(scores, different).square().sum()
        return loss
    return (_log_mean(scores, different).exp() - diagonal(scores).mean(1)).sum()


def _log_mean(scores: Tensor, different: Tensor) -> Tensor:
    return ((scores.exp() * different).sum((1, 2)) / different.sum((1, 2))).log()


def _dv_loss(scores: Tensor, different: Tensor, log_mean: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Return the summed loss whose gradient is DV's with the running mean in the denominator, and that mean's log.

    scores (G, N, N), different (G, N, N) bool, log_mean (G,), nan before the first step.
    """
    log_batch = _log_mean(scores, different)
    detached = log_batch.detach()
    moved = torch.logaddexp(log_mean + math.log(1.0 - rate), detached + math.log(rate))
    log_mean = torch.where(torch.isnan(log_mean), detached, moved)
    return ((log_batch - log_mean).exp() - diagonal(scores).mean(1)).sum(), log_mean


def _measure(
    critic: SeparableCritic, problems: Sequence[Problem], settings: BoundSettings, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return held-out values (E, P, R, W, L) for weightings (W, U) of the utterances, and crowding (E, P, R, L)."""
    shifts = _values(critic, problems, [problem.select for problem in problems], settings)[1]
    values, _, crowding = _values(critic, problems, [p.held_out for p in problems], settings, weights, shifts)
    return values, crowding


@torch.no_grad()
def _values(
    critic: SeparableCritic,
    problems: Sequence[Problem],
    parts: Sequence[Part],
    settings: BoundSettings,
    weights: np.ndarray | None = None,
    shifts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values (E, P, R, W, L) of all critics, the log of their mean over the product, and their crowding.

    The latter two (E, P, R, L). ``shifts``, such as that log on another part, are taken off NWJ's critics: NWJ needs
    T's constant, and a little off in T is much off in exp T. Without them this part's own best constant is taken.
    """
    shape = (len(settings.estimators), len(problems), settings.seeds, len(parts[0].y))
    found = np.empty((*shape[:3], 1 if weights is None else len(weights), shape[3]))
    log_means, crowding = np.zeros(shape), np.zeros(shape)
    for number in np.ndindex(shape[1], shape[3]):
        problem, layer = number
        part, gaussian = parts[problem], problems[problem].gaussian[layer]
        scale = np.ones((1, part.num_utts)) if weights is None else weights
        left, right = gaussian.towers(part.x, part.y[layer], len(gaussian.square))
        base = (left @ right.T)[None]
        for estimator, run in np.ndindex(shape[0], shape[2]):
            key = (estimator, problem, run, layer)
            scores = critic.one(np.ravel_multi_index(key, shape)).scores(part.x[None], part.y[layer][None], base)[0]
            name = settings.estimators[estimator]
            if name == "infonce_heldout":
                value = infonce_value(scores, part.utterance, scale)
            else:
                clip = settings.smile_clip if name == "smile_heldout" else None
                joint, log_mean, crowding[key] = expectations(scores, part.utterance, scale, clip)
                log_means[key], value = log_mean[0], joint - log_mean
                if name == "nwj_heldout":
                    shift = log_mean[0] if shifts is None else shifts[key]
                    value = 1.0 + joint - shift - np.exp(log_mean - shift)
            found[estimator, problem, run, :, layer] = value
    return found, log_means, crowding
