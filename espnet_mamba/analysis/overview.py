"""All measures of a run on one page: a small panel each, and where each of them peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_mamba.analysis.panels import CHANCE
from espnet_mamba.analysis.plots import cell_of, plot_grid
from espnet_mamba.analysis.styles import styles_of
from espnet_mamba.analysis.table import LayerValue, write_table_csv

# InfoNCE first: of the held-out bounds it falls least below the truth (docs/analysis.md).
_BOUNDS = ("infonce_heldout", "dv_heldout", "smile_heldout", "nwj_heldout", "ksg*")
_PUBLISHED = ("mine_paper", "mine_paper_reuse")
# measure (the first that is there), reference (likewise), estimators in order of preference (none: the last in the
# table, which for k-means is the largest K)
_PARTS: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (("mutual_information",), ("layer0", "conv"), _BOUNDS),
    (("mutual_information",), ("layer0", "conv"), _PUBLISHED),
    (("mutual_information",), ("logmel",), _BOUNDS),
    (("mutual_information",), ("logmel",), _PUBLISHED),
    (("reconstruction",), ("logmel",), ("ridge", "mlp")),
    (("phone_purity",), ("phones",), ()),
    (("pnmi",), ("phones",), ()),
    (("phone_accuracy",), ("phones",), ()),
    *(((("pwcca", "cca_mean")), (view,), ()) for view in ("logmel", "phones", "word", "speaker", "emotion")),
    (("speaker_accuracy",), ("speakers",), ()),
    *((("discrete_information",), (labels,), ()) for labels in ("phones", "words", "speakers")),
)


@dataclass(frozen=True)
class Peak:
    """The layer of a system where a measure is highest; ``within`` are the layers inside the peak's interval."""

    row: LayerValue
    within: tuple[int, ...]
    num_layers: int


def overview_kinds(rows: Sequence[LayerValue]) -> list[list[LayerValue]]:
    """Return the rows of each panel of the overview (with chance), in its order; a measure that is not there is not."""
    kinds = []
    for measures, references, estimators in _PARTS:
        for reference in references:
            same = [row for row in rows if row.measure in measures and row.reference == reference]
            measure = next((name for name in measures if any(row.measure == name for row in same)), "")
            same = [row for row in same if row.measure == measure]
            chosen = _choose([row.estimator for row in same if row.estimator != CHANCE], estimators)
            if chosen:
                kinds.append([row for row in same if row.estimator in (chosen, CHANCE)])
                break
    return kinds


def _choose(present: Sequence[str], wanted: Sequence[str]) -> str:
    for name in wanted:
        for estimator in present:
            if estimator == name or name.endswith("*") and estimator.startswith(name[:-1]):
                return estimator
    return present[-1] if present and not wanted else ""


def plot_overview(kinds: Sequence[Sequence[LayerValue]], stem: str | Path, systems: Sequence[str]) -> list[Path]:
    """Draw a panel per kind; write ``stem``.svg, .png and the numbers as .csv; ``systems`` are those of the run."""
    table = Path(f"{stem}.csv")
    write_table_csv(table, [row for rows in kinds for row in rows])
    return [*plot_grid([cell_of(rows) for rows in kinds], stem, styles_of(systems)), table]


def peaks_of(rows: Sequence[LayerValue]) -> list[Peak]:
    """Return a peak per system of rows of one kind, in their order; a system without a number has none."""
    peaks = []
    for system in dict.fromkeys(row.system for row in rows):
        own = [row for row in rows if row.system == system and row.estimator != CHANCE and not math.isnan(row.value)]
        if not own:
            continue
        best = max(own, key=lambda row: row.value)
        floor = best.value if math.isnan(best.low) else best.low
        within = tuple(sorted(row.layer for row in own if row.value >= floor))
        peaks.append(Peak(best, within, len(own)))
    return peaks
