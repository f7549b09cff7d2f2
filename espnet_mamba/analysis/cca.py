"""Canonical correlations on held-out folds: their mean, and their projection-weighted mean (PWCCA).

PWCCA follows Morcos et al. 2018 and the layer-wise analyses of Pasad et al. 2021: 10 folds, of which 8 fit the
directions, one chooses the regularisation and one gives the value; the weights are those of the narrower view. What
differs: columns are standardised before the regularisation is added (so no unit of a feature matters), and the weights
are taken on the folds that fitted the directions, where these are orthogonal.

The wider view has width D, the narrower one d. Everything held out is done in the d-dimensional span of
(C_xx + eps I)^-1 C_xy, so one Cholesky factor per regularisation serves all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_factor, cho_solve, eigh, eigvalsh

from espnet_mamba.analysis.covariance import FoldMoments

_RANK = 1e-10  # eigenvalues of a correlation matrix below this part of the largest are rounding
_NO_RELATION = 1e-7  # canonical correlations below this part of the largest are rounding
_DEV, _TEST = 0, 1  # the held-out parts
MEASURES = ("cca_mean", "pwcca")


@dataclass(frozen=True)
class CcaSettings:
    """How CCA is regularised; eps are added to the diagonal of the correlation matrices, whose diagonal is 1."""

    eps_wide: tuple[float, ...] = (1e-8, 1e-4, 1e-2, 0.1, 1.0)  # for the wider view; all pairs are tried
    eps_narrow: tuple[float, ...] = (1e-8, 1e-2)  # for the narrower view
    trials: int = 10  # choices of (dev, test) fold; each fold is test once when there are as many trials as folds

    def __post_init__(self) -> None:
        for name in ("eps_wide", "eps_narrow"):
            values = tuple(float(eps) for eps in getattr(self, name))
            if not values or min(values) < 1e-12:
                raise ValueError(f"{name}: {list(values)} must be one or more numbers, none below 1e-12")
            object.__setattr__(self, name, values)


class Scores(NamedTuple):
    """Mean and projection-weighted mean of canonical correlations."""

    cca_mean: float
    pwcca: float


class CcaTrials(NamedTuple):
    """Held-out scores (trials, 2) in the order of MEASURES, of every null (nulls, trials, 2), and the eps chosen."""

    scores: np.ndarray
    nulls: np.ndarray
    eps: list[tuple[tuple[float, float], ...]]  # per trial, per measure: (wide, narrow)


class _Wide:
    """The wide view of one trial: standardised by its training rows, with a Cholesky factor per regularisation."""

    def __init__(self, moments: FoldMoments, name: str, parts: Sequence[Sequence[int]]) -> None:
        self.name = name
        blocks = [moments.covariance(name, name, folds) for folds in parts]
        self.scale = _scale(blocks[0])  # (D,) 1 / deviation, 0 for a constant column
        for block in blocks:
            block *= self.scale[:, None]
            block *= self.scale
        self.train, *self.held_out = blocks
        self._factors: dict[float, tuple[np.ndarray, bool]] = {}

    def solve(self, eps: float, right: np.ndarray) -> np.ndarray:
        """Return (C + eps I)^-1 right: (D, d)."""
        if eps not in self._factors:
            regularised = self.train.copy()
            regularised[np.diag_indices_from(regularised)] += eps
            self._factors[eps] = cho_factor(regularised, lower=True, overwrite_a=True, check_finite=False)
        return cho_solve(self._factors[eps], right, check_finite=False)


class _Narrow:
    """The narrow view of one trial and its covariances with the wide one; all standardised by training rows."""

    def __init__(
        self, moments: FoldMoments, wide: _Wide, name: str, parts: Sequence[Sequence[int]], limit: int
    ) -> None:
        blocks = [moments.covariance(name, name, folds) for folds in parts]
        scale = _scale(blocks[0])
        self.train, *self.held_out = [block * scale[:, None] * scale for block in blocks]
        crosses = [moments.covariance(wide.name, name, folds) for folds in parts]
        self.cross, *self.held_out_cross = [cross * wide.scale[:, None] * scale for cross in crosses]
        self.deviation = np.where(scale > 0.0, 1.0 / np.where(scale > 0.0, scale, 1.0), 0.0)  # (d,)
        eigenvalues, vectors = eigh(self.train, check_finite=False)
        keep = eigenvalues > _RANK * max(eigenvalues[-1], 1e-300)
        self.eigenvalues, self.vectors = eigenvalues[keep], vectors[:, keep]
        self.rank = min(limit, int(keep.sum()), moments.count(parts[0]) - 1)  # pairs of directions that exist


class _Span(NamedTuple):
    """What one regularisation of the wide view leaves to be done, all (d, d); B = (wide + eps)^-1 cross."""

    gram: np.ndarray  # cross^T B
    wide: np.ndarray  # B^T wide B of a held-out part
    cross: np.ndarray  # B^T cross of it
    narrow: np.ndarray


def cross_validate(moments: FoldMoments, x: str, y: str, settings: CcaSettings, nulls: Sequence[str] = ()) -> CcaTrials:
    """Score views ``x`` and ``y`` on held-out folds; each of ``nulls`` stands in for ``y`` at the eps chosen for ``y``.

    ValueError when there are fewer than 3 folds, an empty fold, or a view that is constant.
    """
    folds = moments.num_folds
    if folds < 3 or settings.trials > folds:
        raise ValueError(f"CCA: {folds} folds are too few, it takes 3 and one per trial ({settings.trials})")
    empty = [fold for fold in range(folds) if moments.count([fold]) < 2]
    if empty:
        raise ValueError(f"CCA of {x} and {y}: fold {empty[0]} has fewer than 2 rows; give more data or lower folds")
    limit = _rank(moments, x, y)
    scores = np.empty((settings.trials, len(MEASURES)))
    null_scores = np.empty((len(nulls), settings.trials, len(MEASURES)))
    chosen = []
    for trial in range(settings.trials):
        parts = _parts(folds, trial)
        wide_name, narrow_name = _sides(moments, x, y)
        wide = _Wide(moments, wide_name, parts)
        narrow = _Narrow(moments, wide, narrow_name, parts, limit)
        eps = _choose(wide, narrow, settings)
        others = [_sides(moments, x, null) for null in nulls]
        if all(side == wide_name for side, _ in others):
            narrows = [narrow, *(_Narrow(moments, wide, name, parts, limit) for _, name in others)]
            found = np.array(_test(wide, narrows, eps))
            scores[trial], null_scores[:, trial] = found[0], found[1:]
        else:
            scores[trial] = _test(wide, [narrow], eps)[0]
            for number, (wide_null, name) in enumerate(others):
                own = _Wide(moments, wide_null, parts)
                null_scores[number, trial] = _test(own, [_Narrow(moments, own, name, parts, limit)], eps)[0]
        chosen.append(tuple(eps))
    return CcaTrials(scores, null_scores, chosen)


def _parts(folds: int, trial: int) -> tuple[list[int], list[int], list[int]]:
    """Return the folds that are train, dev and test."""
    test, dev = trial, (trial + 1) % folds
    return [fold for fold in range(folds) if fold not in (test, dev)], [dev], [test]


def _sides(moments: FoldMoments, x: str, y: str) -> tuple[str, str]:
    """Return (wide, narrow); at equal widths the second is the narrow one, whose projections are the weights."""
    return (x, y) if moments.widths[x] >= moments.widths[y] else (y, x)


def _rank(moments: FoldMoments, x: str, y: str) -> int:
    """Return how many pairs of directions all data hold; ValueError names a constant view."""
    ranks = []
    for name in (x, y):
        covariance = moments.covariance(name, name, range(moments.num_folds))
        scale = _scale(covariance)
        if not scale.any():
            raise ValueError(f"CCA of {x} and {y}: {name} is the same in all rows; there is nothing to correlate")
        eigenvalues = eigvalsh(covariance * np.outer(scale, scale), check_finite=False)
        ranks.append(int((eigenvalues > _RANK * eigenvalues[-1]).sum()))
    return min(ranks)


def _scale(covariance: np.ndarray) -> np.ndarray:
    variance = np.diagonal(covariance)
    return np.where(variance > 0.0, 1.0 / np.sqrt(np.where(variance > 0.0, variance, 1.0)), 0.0)


def _spans(wide: _Wide, jobs: Sequence[tuple[_Narrow, float]], part: int) -> list[_Span]:
    """Solve for B of every (narrow view, eps) and look at held-out part ``part`` through it.

    Views of the same eps are solved side by side and all are multiplied at once: thin products are slow.
    """
    bases: list[np.ndarray] = []
    for eps, group in groupby(jobs, key=lambda job: job[1]):
        crosses = [narrow.cross for narrow, _ in group]
        solved = wide.solve(eps, np.concatenate(crosses, axis=1))
        bases += np.split(solved, np.cumsum([cross.shape[1] for cross in crosses])[:-1], axis=1)
    images = np.split(
        wide.held_out[part] @ np.concatenate(bases, axis=1), np.cumsum([basis.shape[1] for basis in bases])[:-1], axis=1
    )
    return [
        _Span(narrow.cross.T @ basis, basis.T @ image, basis.T @ narrow.held_out_cross[part], narrow.held_out[part])
        for (narrow, _), basis, image in zip(jobs, bases, images, strict=True)
    ]


def _scores(narrow: _Narrow, span: _Span, eps: float) -> Scores:
    """Return the scores on the held-out part, with ``eps`` on the narrow view."""
    root = narrow.vectors / np.sqrt(narrow.eigenvalues + eps)
    squares, rotation = eigh(root.T @ span.gram @ root, check_finite=False)
    order = np.argsort(-squares, kind="stable")[: narrow.rank]
    correlations = np.sqrt(np.clip(squares[order], 0.0, None))
    found = correlations > _NO_RELATION * max(correlations.max(initial=0.0), 1e-300)
    directions = root @ rotation[:, order]  # (d, rank)
    right = directions[:, found]
    left = right / correlations[found]  # directions of the wide view, in the span of B
    held = np.zeros(len(order))
    square = ((span.wide @ left) * left).sum(0) * ((span.narrow @ right) * right).sum(0)
    top = ((span.cross @ right) * left).sum(0)
    held[found] = np.where(square > 0.0, top / np.sqrt(np.where(square > 0.0, square, 1.0)), 0.0)
    return Scores(float(held.mean()) if len(held) else 0.0, float(_weights(narrow, directions) @ held))


def _weights(narrow: _Narrow, directions: np.ndarray) -> np.ndarray:
    """Return PWCCA's weights (rank,): |cov(h_i, y_j)| summed over j, h_i of deviation 1 and y_j in its own unit."""
    projections = narrow.train @ directions
    deviation = np.sqrt((directions * projections).sum(0))
    weights = narrow.deviation @ np.abs(projections) / np.where(deviation > 0.0, deviation, 1.0)
    return weights / weights.sum() if weights.sum() > 0.0 else weights


def _choose(wide: _Wide, narrow: _Narrow, settings: CcaSettings) -> list[tuple[float, float]]:
    """Return the (wide, narrow) eps that is best on the dev part, for each measure."""
    best: list[tuple[float, tuple[float, float]]] = [(-np.inf, (0.0, 0.0))] * len(MEASURES)
    spans = _spans(wide, [(narrow, eps_wide) for eps_wide in settings.eps_wide], _DEV)
    for eps_wide, span in zip(settings.eps_wide, spans, strict=True):
        for eps_narrow in settings.eps_narrow:
            scores = _scores(narrow, span, eps_narrow)
            for number, score in enumerate(scores):
                if score > best[number][0]:
                    best[number] = (score, (eps_wide, eps_narrow))
    return [entry[1] for entry in best]


def _test(wide: _Wide, narrows: Sequence[_Narrow], eps: Sequence[tuple[float, float]]) -> list[list[float]]:
    """Return both measures on the test part, each at its own eps, for every narrow view."""
    jobs = [(narrow, eps_wide) for eps_wide in dict.fromkeys(large for large, _ in eps) for narrow in narrows]
    spans = {(id(job[0]), job[1]): span for job, span in zip(jobs, _spans(wide, jobs, _TEST), strict=True)}
    return [
        [_scores(narrow, spans[id(narrow), large], small)[number] for number, (large, small) in enumerate(eps)]
        for narrow in narrows
    ]


def in_sample(moments: FoldMoments, x: str, y: str, eps: float = 1e-10) -> Scores:
    """Return both measures on the rows that fitted the directions: the textbook values.

    With few rows for the width of a view they are near 1 whatever the data hold.
    """
    every = list(range(moments.num_folds))
    wide_name, narrow_name = _sides(moments, x, y)
    wide = _Wide(moments, wide_name, (every, every))
    narrow = _Narrow(moments, wide, narrow_name, (every, every), _rank(moments, x, y))
    return _scores(narrow, _spans(wide, [(narrow, eps)], _DEV)[0], eps)
