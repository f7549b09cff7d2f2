"""One figure per measure, estimator and reference, with the numbers of the figure beside it."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from espnet_mamba.analysis.panels import CHANCE, draw_panel, legend_entries
from espnet_mamba.analysis.styles import Style, complete_styles
from espnet_mamba.analysis.table import LayerValue, read_table_csv, write_table_csv
from espnet_mamba.analysis.titles import axis_label, heading, title_of
from espnet_mamba.figures import save_figure


def plot_layers(
    rows: Sequence[LayerValue],
    out_dir: str | Path,
    systems: Sequence[str] = (),
    relative_depth: bool = False,
) -> list[Path]:
    """Write ``<measure>_<estimator>_<reference>`` .svg, .png and .csv for every kind of value; return the paths.

    The figure is drawn from the CSV as it was written. ``systems`` are those of the whole run, if ``rows`` lack some of
    them: a system then looks the same in every figure of the run. ``relative_depth`` puts systems of different depth
    on one axis from 0 to 1. ValueError when there is nothing to draw.
    """
    kinds = list(dict.fromkeys((row.measure, row.estimator, row.reference) for row in rows if row.estimator != CHANCE))
    if not kinds:
        raise ValueError("the tables hold no rows to draw; look whether stage 11 (analysis) measured anything")
    styles = complete_styles(None, [*systems, *(row.system for row in rows)])
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for measure, estimator, reference in kinds:
        same = [row for row in rows if (row.measure, row.reference) == (measure, reference)]
        drawn = [row for row in same if row.estimator in (estimator, CHANCE)]
        stem = Path(out_dir) / figure_name(measure, estimator, reference)
        table = Path(f"{stem}.csv")
        write_table_csv(table, drawn)
        written += [*save_figure(_figure(read_table_csv(table), styles, relative_depth), stem), table]
    return written


def figure_name(measure: str, estimator: str, reference: str) -> str:
    """Return the name of a figure's files, without what a file system may not take."""
    return re.sub(r"[^\w.-]+", "-", f"{measure}_{estimator}_{reference}")


def count_of_utterances(rows: Sequence[LayerValue]) -> str:
    """Return how many utterances the values are of: ``30 utterances`` or ``20-30 utterances``."""
    counts = sorted({row.num_utts for row in rows if row.estimator != CHANCE})
    return f"{'-'.join(dict.fromkeys((str(counts[0]), str(counts[-1]))))} utterances"


def _figure(rows: Sequence[LayerValue], styles: Mapping[str, Style], relative: bool) -> Figure:
    """Draw the rows of one kind (and of chance); the legend stands under the axes, where no line is."""
    systems = list(dict.fromkeys(row.system for row in rows))
    columns = 3 if max(map(len, systems)) < 24 else 2
    lines = math.ceil(len(systems) / columns)
    figure, panel = plt.subplots(figsize=(6.4, 3.6 + 0.2 * lines), layout="constrained")
    notes = draw_panel(panel, rows, styles, relative)
    handles = legend_entries([rows], styles, with_ceiling=not any("ceiling" in note for note in notes))
    first = rows[0]
    estimator = next(row.estimator for row in rows if row.estimator != CHANCE)
    panel.set_ylabel(axis_label(first.measure, first.unit, short=True))
    head = f"{heading(first.measure, first.reference)}: {title_of(estimator)}"
    notes.append(count_of_utterances(rows))
    panel.set_title(textwrap.fill(f"{head[:1].upper()}{head[1:]}", 88) + f"\n{', '.join(notes)}", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return figure
