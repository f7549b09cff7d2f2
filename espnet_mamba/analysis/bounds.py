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
F frames, D width, L layers, R seeds, P utterances, E = 4 estimators, W weightings of the held-out utterances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t
from torch import Tensor

from espnet_mamba.analysis.bound_settings import ESTIMATORS as ESTIMATORS
from espnet_mamba.analysis.bound_settings import BoundSettings as BoundSettings
from espnet_mamba.analysis.bound_training import train_and_measure
from espnet_mamba.analysis.sampling import bootstrap_weights, interval
from espnet_mamba.analysis.splits import Problem, blocks_of

_CROWDED = 0.25  # share of the true pairs in the product's mean, from which a value falls short by more than a tenth


@dataclass(frozen=True)
class Bound:
    """One held-out value of one layer, in nats: mean over seeds, 95 % interval over held-out utterances.

    The interval is for the information: its upper side is raised by what the value is known to miss, the two below.
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
    part, sizes = problem.held_out, problem.held_out.sizes()
    weights = np.vstack([np.ones(part.num_utts), bootstrap_weights(part.num_utts, settings.resamples, seed)])
    values, crowding = train_and_measure(problem, settings, seed, weights)
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
        for name, value, crowd in zip(settings.estimators, values, crowding.mean(1).tolist(), strict=True)
    }


def _summary(values: np.ndarray, ceiling: float, frames: int, utts: int, slack: float, crowding: float) -> Bound:
    """Summarise one layer's values (R, W), of which the first of W is the value itself and the rest resamples."""
    mean = values.mean(0)
    spread = float(values[:, 0].std(ddof=1)) if len(values) > 1 else float("nan")
    low, high = interval(mean[1:].clip(max=ceiling))
    wider = interval_factor(utts)
    # The bootstrap spreads the bound that these critics reach; the truth lies above it by what the training frames left
    # unsettled and by the true pairs in the product's mean. Without these, 8 of 10 intervals at 20 dimensions held it.
    missing = max(0.0, slack) - math.log1p(-min(crowding, 0.99))
    low, high = mean[0] - wider * (mean[0] - low), min(ceiling, mean[0] + wider * (high - mean[0]) + missing)
    return Bound(min(float(mean[0]), ceiling), float(low), float(high), ceiling, spread, frames, utts, slack, crowding)


def interval_factor(utts: int) -> float:
    """How much wider than its percentiles a 95 % bootstrap interval over few utterances has to be: Student's t for the
    normal distribution, and the bootstrap's variance, which divides by U, for that which divides by U - 1."""
    return float(student_t.ppf(0.975, utts - 1) / 1.96 * math.sqrt(utts / (utts - 1))) if utts > 1 else math.nan


def _ceiling(estimator: str, sizes: np.ndarray) -> float:
    """Return ln n of the frames, for InfoNCE the mean of ln K of each frame's candidates; sizes (U,)."""
    count = sizes.sum()
    if estimator == "infonce_heldout":
        return float(sizes @ np.log(count - sizes + 1.0) / count)
    return math.log(count)


def per_utterance_bounds(
    names: Sequence[str], x: Sequence[Tensor], y: Sequence[Tensor], settings: BoundSettings, seed: int = 0
) -> dict[str, list[Bound]]:
    """Return the mean over utterances of each utterance's own bound (the published average, held out): as above.

    x holds (N, Dx), y (L, N, Dy) per utterance. An utterance is split by blocks in time, and negatives are pairs of
    different blocks: what is constant in an utterance, its speaker and its channel, counts as nothing here. Utterances
    with fewer than 6 blocks are left out; ValueError when all are. The interval is over utterances.
    """
    problems, found = [], []
    for name, one, layers in zip(names, x, y, strict=True):
        frames, block = blocks_of(len(one), settings.block_frames, settings.guard_frames)
        if len(block) and int(block[-1]) >= 5:
            problems.append(Problem.create(name, one[frames], layers[:, frames], block, *settings.split, seed))
            found.append(train_and_measure(problems[-1], settings, seed))
    if not problems:
        raise ValueError(
            f"mutual information per utterance: none has {6 * settings.block_frames} frames; lower block_frames"
        )
    values = np.stack([values for values, _ in found], 1)[:, :, :, 0]  # (E, P, R, L)
    crowding = np.stack([crowding for _, crowding in found], 1).mean((1, 2)).tolist()
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
