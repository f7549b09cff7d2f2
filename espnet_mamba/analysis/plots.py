"""Figures of the mutual information and purity tables: a grid of panels that share one legend."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from espnet_mamba.analysis.layer_plots import count_of_utterances
from espnet_mamba.analysis.panels import draw_panel, legend_entries
from espnet_mamba.analysis.styles import Style, complete_styles
from espnet_mamba.analysis.table import LayerValue, write_table_csv
from espnet_mamba.analysis.titles import axis_label, heading, title_of
from espnet_mamba.figures import save_figure

_MOST_ESTIMATORS = 4  # of one page with all references; more are too small to read
_CHIEF = ("mine_paper", "mine_paper_reuse", "dv_heldout", "infonce_heldout")  # shown first where all do not fit
_COLUMNS = 4


@dataclass(frozen=True)
class Cell:
    """One panel: its rows (of one measure, estimator and reference, and of chance) and its title."""

    rows: Sequence[LayerValue]
    title: str
    is_published: bool = False  # the protocol that is no bound: its panel is shaded


def plot_mutual_information(rows: Sequence[LayerValue], stem: str | Path, systems: Sequence[str] = ()) -> list[Path]:
    """Draw a panel per estimator (down) and reference (across); return the paths.

    With more than four estimators ``stem`` shows the published protocol beside the chief bounds, and
    ``<stem>_<reference>`` (.svg, .png, .csv) all estimators of a reference. ``systems`` are those of the whole run.
    """
    styles = complete_styles(None, [*systems, *(row.system for row in rows)])
    rows = [row for row in rows if row.measure == "mutual_information"]
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    references = list(dict.fromkeys(row.reference for row in rows))
    chief = estimators
    if len(estimators) > _MOST_ESTIMATORS:
        chief = [name for name in _CHIEF if name in estimators] or estimators[:_MOST_ESTIMATORS]
    cells = [_cell(rows, estimator, reference) for estimator in chief for reference in references]
    written = plot_grid(cells, stem, styles, len(references))
    if chief == estimators:
        return written
    for reference in references:
        page = Path(f"{stem}_{reference}")
        own = [row for row in rows if row.reference == reference]
        write_table_csv(Path(f"{page}.csv"), own)
        cells = [_cell(own, estimator, reference) for estimator in dict.fromkeys(row.estimator for row in own)]
        written += [*plot_grid(cells, page, styles), Path(f"{page}.csv")]
    return written


def _cell(rows: Sequence[LayerValue], estimator: str, reference: str) -> Cell:
    own = [row for row in rows if (row.estimator, row.reference) == (estimator, reference)]
    name = title_of(estimator)
    return Cell(
        own, f"{textwrap.fill(_capital(name), 44)}\nwith {title_of(reference)}", estimator.startswith("mine_paper")
    )


def plot_purity(rows: Sequence[LayerValue], stem: str | Path, systems: Sequence[str] = ()) -> list[Path]:
    """Draw a panel per K (down) and measure (across), silence left out; return the paths."""
    styles = complete_styles(None, [*systems, *(row.system for row in rows)])
    rows = [row for row in rows if row.reference == "phones" and row.measure != "used_clusters"]
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    cells = [
        Cell(
            [row for row in rows if (row.estimator, row.measure) == (estimator, measure)],
            f"{_capital(title_of(measure, short=True))}, {title_of(estimator)}",
        )
        for estimator in estimators
        for measure in measures
    ]
    return plot_grid(cells, stem, styles, len(measures))


def plot_grid(
    cells: Sequence[Cell], stem: str | Path, styles: Mapping[str, Style], columns: int = _COLUMNS
) -> list[Path]:
    """Draw the cells that have rows, ``columns`` across, one legend below; write ``stem``.svg and .png.

    ValueError when no cell has rows.
    """
    cells = [cell for cell in cells if cell.rows]
    if not cells:
        raise ValueError(f"{stem}: no rows to draw; look whether stage 11 (analysis) measured anything")
    height = math.ceil(len(cells) / columns)
    columns = columns if columns < _COLUMNS else math.ceil(len(cells) / height)  # 5 panels as 3 + 2, not 4 + 1
    systems = list(dict.fromkeys(row.system for cell in cells for row in cell.rows))
    shown = {name: style for name, style in styles.items() if name in systems}
    handles = legend_entries([cell.rows for cell in cells], shown)
    width = 3.1 * columns + 0.5
    across = max(1, min(len(handles), int(13 * width / max(len(str(h.get_label())) + 9 for h in handles))))
    tall = 2.75 * height + 0.25 * math.ceil(len(handles) / across) + 0.1
    figure, axes = plt.subplots(height, columns, figsize=(width, tall), squeeze=False, layout="constrained")
    for panel, cell in zip(axes.flat, cells, strict=False):
        if cell.is_published:
            panel.set_facecolor("0.95")
        notes = draw_panel(panel, cell.rows, shown, num_ticks=7)
        notes = [*notes, count_of_utterances(cell.rows)]
        panel.set_title(f"{cell.title}\n" + textwrap.fill(", ".join(notes), 48), fontsize=8)
        panel.set_ylabel(axis_label(cell.rows[0].measure, cell.rows[0].unit, short=True), fontsize=8)
        panel.xaxis.label.set_size(8)
        panel.tick_params(labelsize=7)
    for panel in axes.flat[len(cells) :]:
        panel.remove()
    figure.legend(handles=handles, loc="outside lower center", ncols=across, fontsize=8, frameon=False)
    return save_figure(figure, stem)


def cell_of(rows: Sequence[LayerValue], title: str = "") -> Cell:
    """Return a panel of ``rows``, which are of one kind, titled by measure, reference and estimator."""
    first = rows[0]
    head = title or heading(first.measure, first.reference, short=True)
    is_published = first.estimator.startswith("mine_paper")
    text = f"{textwrap.fill(_capital(head), 44)}\n{textwrap.fill(title_of(first.estimator, True), 44)}"
    if is_published:
        text = f"{_capital(head)}:\n{title_of(first.estimator, True)}"
    return Cell(rows, text, is_published)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
