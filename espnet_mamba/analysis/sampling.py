"""Randomness that hangs on names, not on order: the same utterance gets the same draw in any batch, shard or run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def seed_from(*keys: object) -> int:
    """Return a 63-bit seed that depends on nothing but ``keys`` (numbers and names)."""
    digest = hashlib.sha256("\x1f".join(str(key) for key in keys).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def torch_generator(*keys: object) -> torch.Generator:
    """Return a CPU generator seeded from ``keys``."""
    return torch.Generator().manual_seed(seed_from(*keys))


def sample_names(names: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Return ``count`` of ``names`` (all when None), the same whatever the input's order, in sorted order."""
    if count is None or count >= len(names):
        return sorted(names)
    return sorted(sorted(names, key=lambda name: seed_from(seed, name))[:count])


def bootstrap_weights(num_utts: int, num_resamples: int, seed: int) -> np.ndarray:
    """Return how often each utterance is drawn in each bootstrap resample: int (resamples, utterances)."""
    rng = np.random.default_rng(seed_from("bootstrap", seed))
    return rng.multinomial(num_utts, np.full(num_utts, 1.0 / num_utts), size=num_resamples)


def interval(values: np.ndarray, coverage: float = 0.95) -> tuple[float, float]:
    """Return the percentile interval of bootstrap ``values`` (resamples,); nan where none is finite."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return float("nan"), float("nan")
    tail = 50.0 * (1.0 - coverage)
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return float(low), float(high)


def centred_interval(value: float, draws: np.ndarray) -> tuple[float, float]:
    """Return the interval of bootstrap ``draws`` moved so that their mean is ``value``.

    A resample repeats utterances, so it holds fewer different frames, and purity and PNMI, which rise as frames get
    fewer, are too high in all of them: the spread is right, the place is not.
    """
    low, high = interval(draws - np.nanmean(draws) + value)
    return low, high
