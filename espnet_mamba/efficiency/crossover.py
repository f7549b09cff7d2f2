"""From which length on a model is the cheaper of two, and how sure that is.

Costs are interpolated as straight lines between measured lengths, both on log axes. The interval is a bootstrap over
the repeats of each length: medians of redrawn repeats, 95 % of the crossings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 500


@dataclass(frozen=True)
class Crossover:
    """``passes`` costs less than ``passed`` from ``seconds`` on, and more before."""

    passes: str
    passed: str
    cost: str  # wall, memory or macs
    mode: str
    batch: str
    seconds: float
    low: float  # 2.5 and 97.5 % of the bootstrap's crossings; nan where there is nothing to redraw
    high: float
    share: float  # of the bootstrap's draws in which it does

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f" [{self.low:.3g}, {self.high:.3g}]"
        unsure = "" if np.isnan(self.share) or self.share > 0.95 else f", in {self.share:.0%} of the draws"
        where = "" if self.cost == "macs" else f", {self.mode}, batch of {self.batch}"
        return f"{self.passes} passes {self.passed} at {self.seconds:.3g} s{interval} ({self.cost}{where}{unsure})"


def last_crossing(lengths: Sequence[float], first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the length from which on ``first`` is below ``second``, or None when it is not, or always was.

    ``lengths`` rise; all are above 0. Where the two meet more than once, the last time counts.
    """
    gap = np.log(np.asarray(first, float)) - np.log(np.asarray(second, float))
    if len(gap) < 2 or gap[-1] >= 0:
        return None
    above = np.nonzero(gap >= 0)[0]
    if len(above) == 0:
        return None
    at = above[-1]
    x = np.log(np.asarray(lengths, float))
    return float(np.exp(x[at] + (x[at + 1] - x[at]) * gap[at] / (gap[at] - gap[at + 1])))


def crossing_of_walls(
    first: Mapping[float, Sequence[float]], second: Mapping[float, Sequence[float]], seed: int = 0
) -> tuple[float, float, float, float] | None:
    """Return (length, low, high, share of draws) from which on ``first`` takes less time; None when it never does.

    Both: length -> repeats; lengths that only one of them has are not looked at.
    """
    lengths = sorted(set(first) & set(second))
    middle = [[float(np.median(own[length])) for length in lengths] for own in (first, second)]
    found = last_crossing(lengths, *middle)
    if found is None:
        return None
    rng = np.random.default_rng(seed)
    redrawn = [np.stack([_medians(rng, own[length]) for length in lengths], 1) for own in (first, second)]
    draws = [last_crossing(lengths, a, b) for a, b in zip(*redrawn, strict=True)]
    hits = [draw for draw in draws if draw is not None]
    if not hits:
        return found, float("nan"), float("nan"), 0.0
    low, high = np.percentile(hits, [2.5, 97.5])
    if low == high:  # one call at each length around it: nothing to redraw is not certainty
        return found, float("nan"), float("nan"), len(hits) / len(draws)
    return found, float(low), float(high), len(hits) / len(draws)


def all_crossovers(
    series: Mapping[tuple[str, str, str], Mapping[float, Sequence[float]]],
    cost: str,
    with_interval: bool,
) -> list[Crossover]:
    """Return the crossings of every ordered pair of models under the same mode and batch.

    Args:
        series: (model, mode, batch) -> length -> repeats (one value where nothing is repeated).
        cost: what is compared; the results bear its name.
        with_interval: whether the repeats are redrawn.
    """
    found = []
    for model, mode, batch in series:
        for other, other_mode, other_batch in series:
            if other == model or (mode, batch) != (other_mode, other_batch):
                continue
            pair = series[model, mode, batch], series[other, mode, batch]
            hit = crossing_of_walls(*pair) if with_interval else _crossing_of_values(*pair)
            if hit is not None:
                found.append(Crossover(model, other, cost, mode, batch, *hit))
    return found


def macs_crossovers(
    macs: Mapping[str, Callable[[float], float]], shortest: float = 1.0, longest: float = 3600.0
) -> list[Crossover]:
    """Return where formulas cross; ``macs``: model -> MACs per second of audio at a length."""
    lengths = np.geomspace(shortest, longest, 400).tolist()
    curves = {name: {length: [of(length)] for length in lengths} for name, of in macs.items()}
    return all_crossovers({(name, "eval", "one"): curve for name, curve in curves.items()}, "macs", False)


def _crossing_of_values(
    first: Mapping[float, Sequence[float]], second: Mapping[float, Sequence[float]]
) -> tuple[float, float, float, float] | None:
    lengths = sorted(set(first) & set(second))
    values = ([own[length][0] for length in lengths] for own in (first, second))
    found = last_crossing(lengths, *values)
    return None if found is None else (found, float("nan"), float("nan"), float("nan"))


def _medians(rng: np.random.Generator, values: Sequence[float]) -> np.ndarray:
    drawn = rng.choice(np.asarray(values, float), size=(RESAMPLES, len(values)))
    return np.median(drawn, axis=1)
