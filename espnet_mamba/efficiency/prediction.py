"""What a call will take, time or memory, from what shorter ones took.

With B utterances of L seconds, a cost is a + b * B L + c * B L^2: fixed, per frame, and per pair of frames (attention
that keeps its scores). The coefficients are fitted without negative ones, relative errors counting alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

PRIOR_MB = {"eval": 25.0, "train": 150.0}  # MiB per second of audio: three tensors of HuBERT's first convolution
UNGUARDED_SECONDS = 5.0
PRIOR_RATE = 2e10  # MACs per second, of one slow core


class Point(NamedTuple):
    """A measured cost."""

    batch_size: int
    seconds: float  # of one utterance
    cost: float


def predict(points: Sequence[Point], batch_size: int, seconds: float) -> float:
    """Return the cost of a batch of ``batch_size`` times ``seconds``; ValueError without a point.

    From one total length alone nothing is known of its growth; the most that any model here grows is assumed, with
    the square.
    """
    if not points:
        raise ValueError("no shorter call was measured, so that nothing can be predicted; measure a short one first")
    known = len({(p.batch_size * p.seconds, p.seconds) for p in points})
    terms = {1: [2], 2: [1, 2]}.get(known, [0, 1, 2])
    rows = np.array([_terms(p.batch_size, p.seconds) for p in points])[:, terms]
    costs = np.array([max(p.cost, 1e-9) for p in points])
    weights, _ = nnls(rows / costs[:, None], np.ones(len(costs)))
    return float(np.array(_terms(batch_size, seconds))[terms] @ weights)


def prior_memory_mb(mode: str, batch_size: int, seconds: float) -> float:
    """Return a guess for a model of which nothing is measured; 0 for a few seconds, which are called without one."""
    total = batch_size * seconds
    return PRIOR_MB[mode] * total if total > UNGUARDED_SECONDS else 0.0


def prior_wall(mode: str, macs: float) -> float:
    """Return a guess in seconds; a backward pass is twice a forward pass."""
    return macs / PRIOR_RATE * (3.0 if mode == "train" else 1.0)


def _terms(batch_size: int, seconds: float) -> tuple[float, float, float]:
    return 1.0, batch_size * seconds, batch_size * seconds**2
