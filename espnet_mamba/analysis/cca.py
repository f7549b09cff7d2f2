"""Canonical correlations on held-out folds: their mean, and their projection-weighted mean (PWCCA).

PWCCA follows Morcos et al. 2018 and the layer-wise analyses of Pasad et al. 2021: 10 folds, of which 8 fit the
directions, one chooses the regularisation and one gives the value; the weights are those of the narrower view. What
differs: columns are standardised before the regularisation is added (so no unit of a feature matters), and the weights
are taken on the folds that fitted the directions, where these are orthogonal.

The wider view has width D, the narrower one d. Everything held out is done in the d-dimensional span of
B = (C_xx + eps I)^-1 C_xy, so one Cholesky factor per regularisation serves all of it. Where fewer rows than D fit the
directions and are at hand, B = X^T (X X^T / n + eps I)^-1 Y / n gives the same from a factor of their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh, eigvalsh

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


class ConstantView(ValueError):
    """A view, or a layer, is the same in all rows."""


class _Factors:
    """Cholesky factors of one symmetric matrix, one per regularisation."""

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix
        self._factors: dict[float, tuple[np.ndarray, bool]] = {}

    def solve(self, eps: float, right: np.ndarray) -> np.ndarray:
        """Return (matrix + eps I)^-1 right."""
        if eps not in self._factors:
            regularised = self.matrix.copy()
            regularised[np.diag_indices_from(regularised)] += eps
            # It is symmetric: its transpose is what LAPACK takes without a copy.
            self._factors[eps] = cho_factor(regularised.T, lower=True, overwrite_a=True, check_finite=False)
        return cho_solve(self._factors[eps], right, check_finite=False)


class _Wide(Protocol):
    """The wide view of one trial, standardised by its training rows."""

    def against(self, name: str, scale: np.ndarray) -> list[np.ndarray]:
        """Return what :meth:`spans` needs of a narrow view, for every part (train, dev, test); (d,) ``scale`` of it."""
        ...

    def spans(self, jobs: Sequence[tuple[_Narrow, float]], part: int) -> list[_Span]:
        """Solve for B of every (narrow view, eps) and look at held-out part ``part`` through it.

        All are solved side by side and multiplied at once: thin products are slow.
        """
        ...


class _WideCovariance:
    """The wide view by its covariance (D, D)."""

    def __init__(self, moments: FoldMoments, name: str, parts: Sequence[Sequence[int]]) -> None:
        self._moments, self._name, self._parts = moments, name, parts
        blocks = [moments.covariance(name, name, folds) for folds in parts]
        self._scale = _scale(blocks[0])  # (D,) 1 / deviation, 0 for a constant column
        for block in blocks:
            block *= self._scale[:, None]
            block *= self._scale
        train, *self._held_out = blocks
        self._factors = _Factors(train)

    def against(self, name: str, scale: np.ndarray) -> list[np.ndarray]:
        """Return the covariances (D, d) of the parts."""
        crosses = [self._moments.covariance(self._name, name, folds) for folds in self._parts]
        return [cross * self._scale[:, None] * scale for cross in crosses]

    def spans(self, jobs: Sequence[tuple[_Narrow, float]], part: int) -> list[_Span]:
        """See :class:`_Wide`."""
        bases = _solve(self._factors, jobs)
        images = _split(self._held_out[part] @ np.concatenate(bases, axis=1), jobs)
        return [
            _Span(narrow.sides[0].T @ basis, basis.T @ image, basis.T @ narrow.sides[1 + part], narrow.held_out[part])
            for (narrow, _), basis, image in zip(jobs, bases, images, strict=True)
        ]


class _WideRows:
    """The wide view by its n training rows, fewer than D: (n, n) and not (D, D)."""

    def __init__(self, moments: FoldMoments, name: str, parts: Sequence[Sequence[int]]) -> None:
        self._moments, self._parts = moments, parts
        rows = [moments.rows_of(name, folds) for folds in parts]
        scale = _scale_of_rows(rows[0])
        train, *held_out = [part * scale for part in rows]
        self._factors = _Factors(train @ train.T / len(train))
        self._held_out = [part @ train.T for part in held_out]  # (rows of the part, n)

    def against(self, name: str, scale: np.ndarray) -> list[np.ndarray]:
        """Return the rows (R, d) of the parts, those of train over n."""
        train, *held_out = [self._moments.rows_of(name, folds) * scale for folds in self._parts]
        return [train / len(train), *held_out]

    def spans(self, jobs: Sequence[tuple[_Narrow, float]], part: int) -> list[_Span]:
        """See :class:`_Wide`; B = X^T A."""
        weights = _solve(self._factors, jobs)  # A, (n, d) each
        together = np.concatenate(weights, axis=1)
        images = _split(self._held_out[part] @ together, jobs)
        grams = _split(self._factors.matrix @ together, jobs)
        count = len(self._held_out[part])
        return [
            _Span(
                len(gram) * narrow.sides[0].T @ gram,
                image.T @ image / count,
                image.T @ narrow.sides[1 + part] / count,
                narrow.held_out[part],
            )
            for (narrow, _), image, gram in zip(jobs, images, grams, strict=True)
        ]


def _solve(factors: _Factors, jobs: Sequence[tuple[_Narrow, float]]) -> list[np.ndarray]:
    """Return (matrix + eps I)^-1 times what the narrow view has against the wide one, for every job."""
    solved: dict[tuple[int, float], np.ndarray] = {}
    for eps in dict.fromkeys(eps for _, eps in jobs):
        group = [(narrow, own) for narrow, own in jobs if own == eps]
        together = factors.solve(eps, np.concatenate([narrow.sides[0] for narrow, _ in group], axis=1))
        solved |= {(id(narrow), eps): part for (narrow, _), part in zip(group, _split(together, group), strict=True)}
    return [solved[id(narrow), eps] for narrow, eps in jobs]


def _split(columns: np.ndarray, jobs: Sequence[tuple[_Narrow, float]]) -> list[np.ndarray]:
    return np.split(columns, np.cumsum([narrow.sides[0].shape[1] for narrow, _ in jobs])[:-1], axis=1)


def _wide(moments: FoldMoments, name: str, parts: Sequence[Sequence[int]]) -> _Wide:
    """Return the wide view by whichever is smaller."""
    few = moments.rows and moments.count(parts[0]) < moments.widths[name]
    return _WideRows(moments, name, parts) if few else _WideCovariance(moments, name, parts)


class _Narrow:
    """The narrow view of one trial and what the wide one has against it; all standardised by training rows."""

    def __init__(
        self, moments: FoldMoments, wide: _Wide, name: str, parts: Sequence[Sequence[int]], limit: int
    ) -> None:
        blocks = [moments.covariance(name, name, folds) for folds in parts]
        scale = _scale(blocks[0])
        self.train, *self.held_out = [block * scale[:, None] * scale for block in blocks]
        self.sides = wide.against(name, scale)
        self.deviation = np.where(scale > 0.0, 1.0 / np.where(scale > 0.0, scale, 1.0), 0.0)  # (d,)
        eigenvalues, vectors = eigh(self.train, driver="evd", check_finite=False)
        keep = eigenvalues > _RANK * max(eigenvalues[-1], 1e-300)
        self.eigenvalues, self.vectors = eigenvalues[keep], vectors[:, keep]
        self.rank = min(limit, int(keep.sum()), moments.count(parts[0]) - 1)  # pairs of directions that exist


class _Span(NamedTuple):
    """What one regularisation of the wide view leaves to be done, all (d, d)."""

    gram: np.ndarray  # cross^T B
    wide: np.ndarray  # B^T wide B of a held-out part
    cross: np.ndarray  # B^T cross of it
    narrow: np.ndarray


def cross_validate(moments: FoldMoments, x: str, y: str, settings: CcaSettings, nulls: Sequence[str] = ()) -> CcaTrials:
    """Score views ``x`` and ``y`` on held-out folds; each of ``nulls`` stands in for ``y`` at the eps chosen for ``y``.

    ValueError when there are fewer than 3 folds or an empty fold, ConstantView when a view is constant.
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
        wide = _wide(moments, wide_name, parts)
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
                own = _wide(moments, wide_null, parts)
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
    """Return how many pairs of directions all data hold; ConstantView names a constant view."""
    ranks = []
    for name in (x, y):
        every = range(moments.num_folds)
        if moments.rows and moments.count(every) < moments.widths[name]:
            rows = moments.rows_of(name, every)
            scale = _scale_of_rows(rows)
            rows *= scale
            correlation = rows @ rows.T / len(rows)  # it has the eigenvalues of the other product, but zeros
        else:
            correlation = moments.covariance(name, name, every)
            scale = _scale(correlation)
            correlation *= scale[:, None]
            correlation *= scale
        if not scale.any():
            raise ConstantView(f"CCA of {x} and {y}: {name} is the same in all rows; there is nothing to correlate")
        ranks.append(_count(correlation))
    return min(ranks)


def _count(correlation: np.ndarray) -> int:
    """Return how many eigenvalues of a matrix are above rounding."""
    surely = correlation.copy()
    surely[np.diag_indices_from(surely)] -= _RANK * np.trace(correlation)  # at least the largest eigenvalue
    try:
        cho_factor(surely.T, lower=True, overwrite_a=True, check_finite=False)
    except LinAlgError:
        eigenvalues = eigvalsh(correlation, check_finite=False)
        return int((eigenvalues > _RANK * eigenvalues[-1]).sum())
    return len(correlation)  # a factor takes a sixth of the time of the eigenvalues


def _scale(covariance: np.ndarray) -> np.ndarray:
    return _inverse_root(np.diagonal(covariance))


def _scale_of_rows(rows: np.ndarray) -> np.ndarray:
    return _inverse_root(np.square(rows).mean(0))


def _inverse_root(variance: np.ndarray) -> np.ndarray:
    return np.where(variance > 0.0, 1.0 / np.sqrt(np.where(variance > 0.0, variance, 1.0)), 0.0)


def _scores(narrow: _Narrow, span: _Span, eps: float) -> Scores:
    """Return the scores on the held-out part, with ``eps`` on the narrow view."""
    root = narrow.vectors / np.sqrt(narrow.eigenvalues + eps)
    squares, rotation = eigh(root.T @ span.gram @ root, driver="evd", check_finite=False)
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
    spans = wide.spans([(narrow, eps_wide) for eps_wide in settings.eps_wide], _DEV)
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
    spans = {(id(job[0]), job[1]): span for job, span in zip(jobs, wide.spans(jobs, _TEST), strict=True)}
    found = []
    for narrow in narrows:
        scores = {(large, small): _scores(narrow, spans[id(narrow), large], small) for large, small in set(eps)}
        found.append([scores[pair][number] for number, pair in enumerate(eps)])
    return found


def in_sample(moments: FoldMoments, x: str, y: str, eps: float = 1e-10) -> Scores:
    """Return both measures on the rows that fitted the directions: the textbook values.

    With few rows for the width of a view they are near 1 whatever the data hold.
    """
    every = list(range(moments.num_folds))
    wide_name, narrow_name = _sides(moments, x, y)
    wide = _WideCovariance(moments, wide_name, (every, every))
    narrow = _Narrow(moments, wide, narrow_name, (every, every), _rank(moments, x, y))
    return _scores(narrow, wide.spans([(narrow, eps)], _DEV)[0], eps)
