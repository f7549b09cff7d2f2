"""Bootstrap intervals over utterances for rates that are a sum of errors over a sum of words."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the ends of its 95 % percentile interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the three numbers under their names, as the result files hold them."""
        return asdict(self)


def rate(errors: np.ndarray, totals: np.ndarray, seed: int = 0) -> Interval:
    """Return ``sum(errors) / sum(totals)`` of utterances (U,) with its interval.

    Whole utterances are drawn with replacement (Bisani and Ney, 2004), since the errors within one are not independent.
    """
    return _interval(_rates(errors, totals, seed), _ratio(errors.sum(), totals.sum()))


def difference(first: np.ndarray, second: np.ndarray, totals: np.ndarray, seed: int = 0) -> Interval:
    """Return the rate of ``first`` less that of ``second``, both (U,) over the same utterances, with its interval.

    Both are resampled by the same draws, so what an utterance's difficulty adds to both cancels.
    """
    if not first.shape == second.shape == totals.shape:
        raise ValueError(f"errors of {len(first)} and {len(second)} utterances cannot be paired; score one set")
    samples = _rates(first, totals, seed) - _rates(second, totals, seed)
    return _interval(samples, _ratio(first.sum() - second.sum(), totals.sum()))


def _rates(errors: np.ndarray, totals: np.ndarray, seed: int) -> np.ndarray:
    """Return the rate of each of RESAMPLES draws (R,)."""
    if len(errors) == 0:
        raise ValueError("no utterance to score; check that the test set's list is not empty")
    draws = np.random.default_rng(seed).integers(0, len(errors), (RESAMPLES, len(errors)))
    return _ratio(errors[draws].sum(axis=1), totals[draws].sum(axis=1))


def _ratio(errors: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return errors / np.maximum(totals, 1)


def _interval(samples: np.ndarray, value: np.ndarray) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))
