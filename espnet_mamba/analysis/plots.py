"""Figures per layer: systems as lines with interval bands, the null dashed, the ceiling dotted; SVG and PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.figures import save_figure

# Okabe and Ito's palette: told apart by readers with any common colour vision, and by marker in grey print.
_STYLES = {"pretrained": ("#0072B2", "o"), "random": ("#D55E00", "s"), "fbank": ("#009E73", "^")}
_SPARE_STYLES = (("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), ("#000000", "X"))
_TITLES = {
    "mine_paper": "published protocol (training frames)",
    "mine_paper_reuse": "published protocol, one critic reused",
    "dv_heldout": "Donsker-Varadhan bound, held-out",
    "infonce_heldout": "InfoNCE bound, held-out",
    "smile_heldout": "SMILE, held-out",
    "nwj_heldout": "NWJ bound, held-out",
    "phone_purity": "phone purity",
    "cluster_purity": "cluster purity",
    "pnmi": "PNMI",
    "mutual_information": "mutual information",
    "used_clusters": "used clusters",
}


def style_of(system: str, systems: Sequence[str]) -> tuple[str, str]:
    """Return colour and marker of a system, the same in every figure."""
    others = [name for name in systems if name not in _STYLES]
    return _STYLES[system] if system in _STYLES else _SPARE_STYLES[others.index(system) % len(_SPARE_STYLES)]


def plot_mutual_information(rows: Sequence[LayerValue], stem: str | Path) -> list[Path]:
    """One panel per estimator (down) and reference (across)."""
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    references = list(dict.fromkeys(row.reference for row in rows))
    grid = [
        [[row for row in rows if (row.estimator, row.reference) == (estimator, reference)] for reference in references]
        for estimator in estimators
    ]
    titles = [[f"{_TITLES.get(e, e)}\nwith {r}" for r in references] for e in estimators]
    return _plot_grid(grid, titles, "mutual information (nats)", stem)


def plot_purity(rows: Sequence[LayerValue], stem: str | Path) -> list[Path]:
    """One panel per K (down) and measure (across), silence left out."""
    rows = [row for row in rows if row.reference == "phones" and row.measure != "used_clusters"]
    estimators = list(dict.fromkeys(row.estimator for row in rows))
    measures = list(dict.fromkeys(row.measure for row in rows))
    grid = [
        [[row for row in rows if (row.estimator, row.measure) == (estimator, measure)] for measure in measures]
        for estimator in estimators
    ]
    titles = [[f"{_TITLES.get(m, m)}, K = {e.removeprefix('kmeans')}" for m in measures] for e in estimators]
    return _plot_grid(grid, titles, "fraction, silence left out", stem)


def _plot_grid(
    grid: Sequence[Sequence[Sequence[LayerValue]]], titles: Sequence[Sequence[str]], label: str, stem: str | Path
) -> list[Path]:
    height, width = len(grid), len(grid[0])
    figure, axes = plt.subplots(
        height, width, figsize=(3.6 * width + 0.6, 2.7 * height + 0.7), squeeze=False, layout="constrained"
    )
    systems = list(dict.fromkeys(row.system for line in grid for cell in line for row in cell))
    for line, line_titles, line_axes in zip(grid, titles, axes, strict=True):
        for cell, title, panel in zip(line, line_titles, line_axes, strict=True):
            _draw_panel(panel, cell, systems)
            panel.set_title(title, fontsize=9)
            panel.set_xlabel("layer (0 = input of block 1)")
        line_axes[0].set_ylabel(label)
    handles = _legend(systems)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    return save_figure(figure, stem)


def _legend(systems: Sequence[str]) -> list[Artist]:
    styles = [(system, *style_of(system, systems)) for system in systems]
    lines: list[Artist] = [Line2D([], [], color=c, marker=m, markersize=4, label=name) for name, c, m in styles]
    grey = "0.35"
    band = Patch(color=grey, alpha=0.25, linewidth=0, label="95 % interval")
    null = Line2D([], [], color=grey, linestyle="--", linewidth=0.9, label="null: same procedure, pairs shuffled")
    return [*lines, band, null, Line2D([], [], color=grey, linestyle=":", linewidth=1.2, label="ceiling")]


def _draw_panel(panel: Axes, cell: Sequence[LayerValue], systems: Sequence[str]) -> None:
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    if not cell:
        panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes, color="0.4")
        return
    last_layer = max(row.layer for row in cell)
    for system in systems:
        own = sorted((row for row in cell if row.system == system), key=lambda row: row.layer)
        if own:
            _draw_system(panel, own, style_of(system, systems), last_layer)
    panel.set_xticks(range(min(row.layer for row in cell), last_layer + 1, max(1, (last_layer + 1) // 7)))
    top = max(row.value if math.isnan(row.high) else row.high for row in cell)
    ceiling = max(row.ceiling for row in cell)
    if ceiling <= 3.0 * top:
        panel.axhline(ceiling, color="0.35", linestyle=":", linewidth=1.2)
    elif not math.isnan(ceiling):
        panel.annotate(
            f"ceiling {ceiling:.3g}", (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=7
        )
    panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def _draw_system(panel: Axes, rows: Sequence[LayerValue], style: tuple[str, str], last_layer: int) -> None:
    """Draw a line over layers; a system of one layer (filterbanks) goes across as a level to compare with."""
    colour, marker = style
    is_level = len(rows) == 1 and last_layer > 0
    layers = [0, last_layer] if is_level else [row.layer for row in rows]
    spread = (lambda values: list(values) * 2) if is_level else list
    values, nulls = spread([row.value for row in rows]), spread([row.null for row in rows])
    panel.plot(layers, values, color=colour, marker=None if is_level else marker, markersize=4, linewidth=1.6)
    low, high = spread([row.low for row in rows]), spread([row.high for row in rows])
    panel.fill_between(layers, low, high, color=colour, alpha=0.18, linewidth=0)
    panel.plot(layers, nulls, color=colour, linestyle="--", linewidth=0.9)
