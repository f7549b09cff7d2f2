"""Linear centred kernel alignment of two views from their sums of products, plain (Kornblith et al. 2019) and debiased.

The debiased form replaces HSIC by its unbiased estimate (Song et al. 2012), which leaves out every row's product with
itself: plain CKA of independent views tends to sqrt(D_a D_b) / R and more, with few rows R for wide views close to 1.
Rows are taken as independent; what neighbouring frames share remains, and is seen in the shuffled null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from espnet_mamba.analysis.covariance import FoldMoments, centred

MEASURES = ("cka", "cka_debiased")


class Alignment(NamedTuple):
    """CKA in the order of MEASURES: of all rows (2,), without each fold (F, 2), of every null (nulls, 2)."""

    values: np.ndarray
    left_out: np.ndarray
    nulls: np.ndarray


def align(moments: FoldMoments, x: str, y: str, nulls: Sequence[str] = ()) -> Alignment:
    """Compare views ``x`` and ``y``, without each fold in turn too; each of ``nulls`` stands in for ``y``.

    nan for a constant view or fewer than 4 rows.
    """
    every = range(moments.num_folds)
    whole, without = {}, {}
    for pair in ((x, y), (x, x), (y, y)):
        block = moments.block(*pair, every)
        whole[pair] = _terms(moments, pair, block)
        without[pair] = [_terms(moments, pair, block - moments.block(*pair, [fold])) for fold in every]
    left_out = [_ratio(*[without[pair][fold] for pair in ((x, y), (x, x), (y, y))]) for fold in every]
    null_values = [
        _ratio(_own(moments, x, null, every), whole[x, x], _own(moments, null, null, every)) for null in nulls
    ]
    values = _ratio(whole[x, y], whole[x, x], whole[y, y])
    return Alignment(values, np.array(left_out), np.array(null_values).reshape(len(nulls), len(MEASURES)))


def _own(moments: FoldMoments, a: str, b: str, folds: Sequence[int]) -> np.ndarray:
    return _terms(moments, (a, b), moments.block(a, b, folds))


def _ratio(cross: np.ndarray, own_x: np.ndarray, own_y: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((own_x > 0.0) & (own_y > 0.0), cross / np.sqrt(own_x * own_y), np.nan)


def _terms(moments: FoldMoments, pair: tuple[str, str], block: np.ndarray) -> np.ndarray:
    """Return the plain and the unbiased HSIC of linear kernels (2,), up to factors that cancel in CKA.

    Unbiased, with K = A A^T and L = B B^T without their diagonals: tr KL + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1.
    """
    plain = float(np.square(centred(block, pair[0] == pair[1])).sum())
    count = block[-1, -1]
    if count < 4:
        return np.array([plain, np.nan])
    width_a, width_b = moments.widths[pair[0]], moments.widths[pair[1]]
    # Mean squares of rows times the width are the kernels' diagonals.
    sum_a, square_a = block[:-2, -1], block[-2, -1] * width_a
    sum_b, square_b = block[-1, :-2], block[-1, -2] * width_b
    both = block[-2, -2] * width_a * width_b
    trace = np.square(block[:-2, :-2]).sum() - both
    row_sums = sum_a @ block[:-2, :-2] @ sum_b - sum_a @ block[:-2, -2] * width_b
    row_sums += both - block[-2, :-2] @ sum_b * width_a
    ones = (sum_a @ sum_a - square_a) * (sum_b @ sum_b - square_b)
    return np.array([plain, trace + ones / ((count - 1) * (count - 2)) - 2.0 / (count - 2) * row_sums])
