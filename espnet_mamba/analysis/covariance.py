"""Sums from which covariances of several views are made: one pass over audio, one set of sums per fold.

Rows that are all at hand are multiplied fold by fold, in an order of their own. Rows that cannot be kept are added as
they come, to sums that are exact: the contribution of each utterance is rounded once, to a fixed grid, and grid points
are added without rounding. So neither the order of utterances nor how they were shared among shards changes a bit of
any result.
R rows (frames, segments or utterances), D_a width of view a, F folds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from espnet_mamba.analysis.sampling import seed_from

# Grids, each 2^40 finer than the one above: what one rounds off is held by the next. Sums of products have room between
# 2^-84 and 2^47: features whose root mean square lies between 1e-9 and 1e4 lose nothing. Sums with mean squares, up to
# fourth powers, are few and have room for the squares of all that.
_GRID = (2.0**-4, 2.0**-44, 2.0**-84)
_WIDE_GRID = (2.0**76, 2.0**36, *_GRID, 2.0**-124, 2.0**-164)
_LIMIT = 2.0**47
_COARSE = 2.0**-28  # product of the least sums of squares of two views above which the finest grid is not needed
_ADDS_PER_CARRY = 8192  # rounding errors of as many additions still fit between two grids
_CHUNK = 16384  # values that are rounded at once: they stay in the processor's cache
_PANEL = 160  # rows of a symmetric block that are multiplied at once: what lies above the diagonal is not computed
_ROWS = 128  # rows that one call of BLAS sums
_EXTRA = 2  # columns that every view gets: its mean square and 1
_CONSTANT = 1e-12  # a column whose variance is this small a part of its mean square is constant


def assign_folds(
    utt_ids: Sequence[str], num_folds: int, seed: int, labels: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Deal utterances to folds of equal size by a draw that hangs on their names; ``labels`` are spread evenly.

    ValueError when there are fewer utterances than folds.
    """
    if len(utt_ids) < num_folds:
        raise ValueError(f"{len(utt_ids)} utterances cannot be dealt to {num_folds} folds; give more or lower folds")
    label = labels or {}
    ordered = sorted(utt_ids, key=lambda utt_id: (label.get(utt_id, ""), seed_from("fold", seed, utt_id)))
    return {utt_id: number % num_folds for number, utt_id in enumerate(ordered)}


class ExactSum:
    """A vector of sums, exact on a fixed grid: any order of additions and merges gives the same bits."""

    def __init__(self, size: int, grid: Sequence[float] = _GRID) -> None:
        self._grid = grid
        self._parts = np.zeros((len(grid), size))
        self._depth = 1  # grids in use; memory of the others is not touched
        self._adds = 0
        self._bound = 0.0

    def reserve(self, largest: float, where: str) -> None:
        """Announce one addition of values up to ``largest`` in magnitude; ValueError when they leave the grid."""
        self._bound += largest
        if not self._bound < _LIMIT:
            raise ValueError(f"{where}: squares sum to {self._bound:.2g}, more than {_LIMIT:.2g}; scale the features")
        self._adds += 1
        if self._adds >= _ADDS_PER_CARRY:
            self._carry()

    def add(self, start: int, values: np.ndarray, depth: int | None = None) -> None:
        """Add ``values`` (n,) to the sums from ``start`` on, rounded to grid ``depth`` (the finest); destroys them."""
        grid = self._grid[:depth]
        self._depth = max(self._depth, len(grid))
        scratch = np.empty(_CHUNK)
        for first in range(0, len(values), _CHUNK):
            rest = values[first : first + _CHUNK]
            rounded = scratch[: len(rest)]
            place = slice(start + first, start + first + len(rest))
            for part, step in zip(self._parts, grid, strict=False):
                shift = 1.5 * 2.0**52 * step  # what is added to it is rounded to a multiple of the step
                np.add(rest, shift, out=rounded)
                rounded -= shift
                part[place] += rounded
                rest -= rounded

    def merge(self, other: ExactSum) -> None:
        """Add the sums of another shard."""
        self._carry()
        other._carry()
        self._depth = max(self._depth, other._depth)
        self._parts[: self._depth] += other._parts[: self._depth]
        self._carry()
        self._bound += other._bound

    def value(self) -> np.ndarray:
        """Return the sums as float64 (n,)."""
        self._carry()
        total = self._parts[self._depth - 1].copy()
        for part in self._parts[: self._depth - 1][::-1]:
            total += part
        return total

    def _carry(self) -> None:
        """Move whole steps of the coarser grid up. Afterwards equal sums have equal parts, however they came about."""
        for fine in range(self._depth - 1, 0, -1):
            step = self._grid[fine - 1]
            whole = np.floor(self._parts[fine] / step + 0.5) * step
            self._parts[fine] -= whole
            self._parts[fine - 1] += whole
        self._adds = 0


class CovarianceSums:
    """Sums of products of the rows of several views, per fold.

    ``widths`` names the views, ``pairs`` the blocks that are wanted; (a, a) is added for every view in a pair. Each
    view is extended by two columns, the row's mean square and 1: so row counts, means and what debiased CKA needs are
    sums of products too.
    """

    def __init__(self, widths: Mapping[str, int], pairs: Sequence[tuple[str, str]], num_folds: int) -> None:
        views = dict.fromkeys(name for pair in pairs for name in pair)
        self.pairs = [*((name, name) for name in views), *(pair for pair in pairs if pair[0] != pair[1])]
        self.widths = {name: widths[name] for name in views}
        size = sum(stop * (last - first) for pair in self.pairs for first, last, stop in self._panels(pair))
        edges = sum(_EXTRA * (self.widths[a] + self.widths[b] + _EXTRA) for a, b in self.pairs)
        self._sums = [ExactSum(size) for _ in range(num_folds)]
        self._edges = [ExactSum(edges, _WIDE_GRID) for _ in range(num_folds)]

    def _panels(self, pair: tuple[str, str]) -> list[tuple[int, int, int]]:
        """Return the parts of a block in the order they are kept: rows first .. last - 1, columns up to stop."""
        height, width = self.widths[pair[0]], self.widths[pair[1]]
        if pair[0] != pair[1]:
            return [(0, height, width)]
        cuts = range(0, height, _PANEL)
        return [(first, min(first + _PANEL, height), min(first + _PANEL, height)) for first in cuts]

    def add(self, fold: int, rows: Mapping[str, np.ndarray], where: str) -> None:
        """Add the rows of one utterance: view -> (R, D), the same R.

        Bits do not depend on the order of calls, but they do on what is given in one call: give whole utterances.
        ValueError begins with ``where`` (the utterance) and names the view when a value is NaN or infinite, or when the
        squares are so large that they leave the grid.
        """
        if not len(next(iter(rows.values()))):
            return
        count = len(next(iter(rows.values())))
        extended = {
            name: _extend([rows[name]], np.empty((count, width + _EXTRA))) for name, width in self.widths.items()
        }
        squares = {name: self._squares(name, values, where) for name, values in extended.items()}
        # The smallest column decides: two grids hold its products to 1e-9 and better, all others more closely.
        smallest = {name: float(values[values > 0.0].min(initial=np.inf)) for name, values in squares.items()}
        total, edges = self._sums[fold], self._edges[fold]
        total.reserve(max(float(values.max(initial=0.0)) for values in squares.values()), where)
        edges.reserve(0.0, where)
        place = edge = 0
        for a, b in self.pairs:
            left, right = extended[a], extended[b]
            depth = 2 if smallest[a] * smallest[b] > _COARSE else 3
            for first, last, stop in self._panels((a, b)):
                total.add(place, _product(left[:, first:last], right[:, :stop]).ravel(), depth)
                place += stop * (last - first)
            for sides in ((left, right[:, -_EXTRA:]), (left[:, -_EXTRA:], right[:, :-_EXTRA])):
                values = _product(*sides)
                edges.add(edge, values.ravel())
                edge += values.size

    @staticmethod
    def _squares(name: str, values: np.ndarray, where: str) -> np.ndarray:
        """Return the sum of squares of every column (D,); ValueError when one is not finite."""
        squares = np.einsum("rd,rd->d", values[:, :-_EXTRA], values[:, :-_EXTRA])
        if not np.isfinite(squares).all():
            raise ValueError(f"{where}: {name} holds NaN or infinity; check the model and this recording")
        return squares

    def merge(self, other: CovarianceSums) -> None:
        """Add the sums of another shard of the same views and folds; ValueError when they are not the same."""
        if (self.pairs, self.widths, len(self._sums)) != (other.pairs, other.widths, len(other._sums)):
            raise ValueError(f"shards of different views: {self.widths} and {other.widths}; rerun with one setting")
        for own, theirs in zip(self._sums + self._edges, other._sums + other._edges, strict=True):
            own.merge(theirs)

    def moments(self) -> FoldMoments:
        """Return the blocks of every fold."""
        folds = len(self._sums)
        blocks = {(a, b): np.empty((folds, self.widths[a] + _EXTRA, self.widths[b] + _EXTRA)) for a, b in self.pairs}
        for fold in range(folds):
            values, edges = self._sums[fold].value(), self._edges[fold].value()
            place = edge = 0
            for pair, block in ((pair, blocks[pair][fold]) for pair in self.pairs):
                for first, last, stop in self._panels(pair):
                    panel = values[place : place + stop * (last - first)].reshape(last - first, stop)
                    block[first:last, :stop] = panel
                    if pair[0] == pair[1]:
                        block[:stop, first:last] = panel.T
                    place += panel.size
                for part in (block[:, -_EXTRA:], block[-_EXTRA:, :-_EXTRA]):
                    part[:] = edges[edge : edge + part.size].reshape(part.shape)
                    edge += part.size
        return FoldMoments(dict(self.widths), blocks, folds)


def own_product(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the sums of products of rows with themselves, (R, D) in all to (D + 2, D + 2), as in FoldMoments."""
    extended = _extend(parts, np.empty((sum(len(part) for part in parts), parts[0].shape[1] + _EXTRA)))
    return extended.T @ extended


def moments_of_rows(
    folds: Iterable[Mapping[str, Sequence[np.ndarray]]],
    keep_rows: bool = False,
    own: Sequence[np.ndarray] | None = None,
) -> FoldMoments:
    """Return the sums of the first view with all others, and of each with itself: one product per fold.

    Every fold is view -> parts, (R, D) each, which are stacked in the order given: that order fixes every bit, with one
    thread of BLAS. With ``keep_rows`` the rows stay beside the sums, for those who solve in the space of rows. ``own``
    are the products of the first view with itself, per fold, where they are known.
    """
    blocks: dict[tuple[str, str], list[np.ndarray]] = {}
    kept: list[dict[str, np.ndarray]] = []
    widths: dict[str, int] = {}
    memory = np.empty(0)  # one for all folds: pages that the system must clear cost more than their conversion
    for number, fold in enumerate(folds):
        widths = {name: parts[0].shape[1] for name, parts in fold.items()}
        edges = np.cumsum([0, *(width + _EXTRA for width in widths.values())])
        count = sum(len(part) for part in next(iter(fold.values())))
        if len(memory) < count * edges[-1]:
            memory = np.empty(count * edges[-1])
        first, others = edges[1] * count, memory[edges[1] * count : edges[-1] * count].reshape(count, -1)
        views = [memory[:first].reshape(count, -1), *np.split(others, edges[2:-1] - edges[1], axis=1)]
        for parts, view in zip(fold.values(), views, strict=True):
            _extend(parts, view)
        (name, *names), (left, *rights) = fold, views
        products = {(name, name): left.T @ left if own is None else own[number]}
        products |= {(b, b): right.T @ right for b, right in zip(names, rights, strict=True)}
        # Others first: Fortran order from the layer's side, as LAPACK wants its right-hand sides.
        crosses = np.split(others.T @ left, edges[2:-1] - edges[1])
        products |= {(b, name): cross for b, cross in zip(names, crosses, strict=True)}
        for pair, product in products.items():
            blocks.setdefault(pair, []).append(product)
        if keep_rows:
            kept.append({name: view[:, :-_EXTRA].copy() for name, view in zip(fold, views, strict=True)})
    return FoldMoments(widths, dict(blocks), len(blocks[name, name]), tuple(kept))


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return left^T right, (R, D_a), (R, D_b) to (D_a, D_b), with the same bits for any number of BLAS threads.

    With many rows BLAS sums them in parts, which it cuts differently when it has several threads.
    """
    total = left[:_ROWS].T @ right[:_ROWS]
    for start in range(_ROWS, len(left), _ROWS):
        total += left[start : start + _ROWS].T @ right[start : start + _ROWS]
    return total


def _extend(parts: Sequence[np.ndarray], extended: np.ndarray) -> np.ndarray:
    """Stack ``parts``, (R, D) in all, into ``extended`` (R, D + 2), with mean square and 1 behind, and return it."""
    rows = extended[:, :-_EXTRA]
    np.concatenate(parts, out=rows)
    extended[:, -_EXTRA] = np.einsum("rd,rd->r", rows, rows) / rows.shape[1]
    extended[:, -1] = 1.0
    return extended


@dataclass(frozen=True)
class FoldMoments:
    """Sums of products per fold: (a, b) -> (F, D_a + 2, D_b + 2), the last two columns mean square and 1.

    ``rows`` are what the sums are of, per fold view -> (R, D), where there were few; else empty.
    """

    widths: dict[str, int]
    blocks: Mapping[tuple[str, str], Sequence[np.ndarray] | np.ndarray]
    num_folds: int
    rows: tuple[dict[str, np.ndarray], ...] = ()

    def block(self, a: str, b: str, folds: Sequence[int]) -> np.ndarray:
        """Return the sums of products over some folds, uncentred: (D_a + 2, D_b + 2)."""
        if (a, b) not in self.blocks:
            return self.block(b, a, folds).T
        blocks = self.blocks[a, b]
        total = blocks[folds[0]].copy()
        for fold in folds[1:]:
            total += blocks[fold]
        return total

    def count(self, folds: Sequence[int]) -> int:
        """Return the rows in some folds."""
        name = next(iter(self.widths))
        return int(sum(self.blocks[name, name][fold][-1, -1] for fold in folds))

    def rows_of(self, name: str, folds: Sequence[int]) -> np.ndarray:
        """Return the rows of a view in some folds, (R, D), less their mean; a column that is constant there is 0."""
        rows = np.concatenate([self.rows[fold][name] for fold in folds])
        square = np.square(rows).mean(0)
        rows -= rows.mean(0)
        rows[:, np.square(rows).mean(0) <= _CONSTANT * square] = 0.0
        return rows

    def covariance(self, a: str, b: str, folds: Sequence[int]) -> np.ndarray:
        """Return the covariance of two views over some folds: (D_a, D_b); a constant column has exactly 0."""
        return centred(self.block(a, b, folds), a == b)


def centred(block: np.ndarray, same_view: bool) -> np.ndarray:
    """Return the covariance (D_a, D_b) of uncentred sums (D_a + 2, D_b + 2)."""
    count = max(block[-1, -1], 1.0)
    mean_a, mean_b = block[:-_EXTRA, -1] / count, block[-1, :-_EXTRA] / count
    covariance = block[:-_EXTRA, :-_EXTRA] / count
    square = np.diagonal(covariance).copy() if same_view else None
    covariance -= np.outer(mean_a, mean_b)
    if square is not None:
        constant = np.diagonal(covariance) <= _CONSTANT * square
        covariance[constant] = 0.0
        covariance[:, constant] = 0.0
    return covariance
