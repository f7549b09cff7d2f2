"""The course of pretraining: loss, accuracy at masked frames and phone purity of each layer, against the step."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from espnet_mamba.analysis.curves import CURVES
from espnet_mamba.analysis.styles import styles_of
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.data.files import atomic_path
from espnet_mamba.figures import save_figure

_SYSTEM = re.compile(r"(?P<run>.+)@(?P<step>\d+)")


@dataclass(frozen=True)
class StepPurity:
    """Phone purity of one layer of a run's model after ``step`` updates: fractions, with their 95 % interval."""

    run: str
    step: int
    layer: int
    value: float
    low: float
    high: float


def purity_of_steps(rows: Sequence[LayerValue], reference: str = "phones") -> list[StepPurity]:
    """Pick phone purity of systems named ``RUN@STEP`` from the rows of an analysis, of its largest K.

    Args:
        rows: of ``purity.csv``.
        reference: ``phones`` (silence left out) or ``phones_and_silence``.

    Raises:
        ValueError: no such system.
    """
    chosen = [row for row in rows if row.measure == "phone_purity" and row.reference == reference]
    named = [(row, match) for row in chosen if (match := _SYSTEM.fullmatch(row.system))]
    if not named:
        systems = sorted({row.system for row in rows})
        raise ValueError(
            f"no system is named RUN@STEP with phone purity; the table holds: {' '.join(systems[:5]) or 'nothing'}; "
            "analyse with --system RUN@STEP=FOLDER"
        )
    largest = max((row.estimator for row, _ in named), key=lambda name: int(name.removeprefix("kmeans")))
    found = [
        StepPurity(match["run"], int(match["step"]), row.layer, row.value, row.low, row.high)
        for row, match in named
        if row.estimator == largest
    ]
    return sorted(found, key=lambda row: (row.run, row.step, row.layer))


def best_layers(purity: Sequence[StepPurity]) -> list[StepPurity]:
    """Return the layer with the highest purity for each run and step."""
    groups: dict[tuple[str, int], list[StepPurity]] = {}
    for row in purity:
        groups.setdefault((row.run, row.step), []).append(row)
    return [max(group, key=lambda row: row.value) for group in groups.values()]


def plot_course(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], purity: Sequence[StepPurity], stem: str | Path
) -> list[Path]:
    """Draw a column per run, layers as shades, over a row that compares the runs; write ``stem`` .svg, .png, .csv.

    Args:
        logs: run -> rows of its ``train_log.jsonl``; only those of the validation set are drawn.
        purity: of the same runs; may be empty, and its panels are then left out.
        stem: path without suffix.
    """
    runs = list(logs)
    styles = styles_of(runs)
    columns = max(3, len(runs)) if purity else 2
    figure, panels = plt.subplots(
        2 if purity else 1,
        columns,
        figsize=(3.6 * columns, 6.4 if purity else 3.4),
        layout="constrained",
        squeeze=False,
    )
    for panel, (key, scale, label) in zip(panels[0], CURVES, strict=False):
        for run, rows in logs.items():
            points = [(row["step"], scale * row[key]) for row in rows if row.get("split") == "valid" and key in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=run, **styles[run].line())
        panel.set(ylabel=label, title="validation set")
    if purity:
        _draw_best(panels[0][2], best_layers(purity), runs, styles)
        lowest, highest = (100.0 * pick(row.value for row in purity) for pick in (min, max))
        margin = 0.05 * (highest - lowest) or 1.0
        for panel, run in zip(panels[1], runs, strict=False):
            _draw_layers(panel, [row for row in purity if row.run == run], run)
            panel.set_ylim(lowest - margin, highest + margin)  # one scale for all, so that runs can be compared
    for panel in panels.flat:
        if not panel.lines:
            panel.set_axis_off()
            continue
        panel.set_xlabel("optimiser step")
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(fontsize=8, frameon=False)
    _write_purity(Path(f"{stem}.csv"), purity)
    return save_figure(figure, stem)


def _draw_best(panel: Axes, best: Sequence[StepPurity], runs: Sequence[str], styles: Mapping[str, Any]) -> None:
    for run in runs:
        own = [row for row in best if row.run == run]
        steps = [row.step for row in own]
        panel.plot(steps, [100.0 * row.value for row in own], label=run, **styles[run].line())
        panel.fill_between(
            steps, [100.0 * r.low for r in own], [100.0 * r.high for r in own], color=styles[run].colour, alpha=0.15
        )
    panel.set(ylabel="phone purity, best layer (%)", title="bands: 95 % over utterances")


def _draw_layers(panel: Axes, rows: Sequence[StepPurity], run: str) -> None:
    """Draw a line per layer, darker for deeper ones; 0 is what enters block 1."""
    layers = sorted({row.layer for row in rows})
    for layer in layers:
        own = [row for row in rows if row.layer == layer]
        shade = plt.get_cmap("viridis_r")(0.1 + 0.9 * layer / max(1, layers[-1]))
        panel.plot([r.step for r in own], [100.0 * r.value for r in own], color=shade, label=f"layer {layer}")
    panel.legend(fontsize=7, frameon=False, ncols=-(-len(layers) // 7))
    panel.set(ylabel="phone purity (%)", title=f"{run}, by layer")


def _write_purity(path: Path, purity: Sequence[StepPurity]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("run", "step", "layer", "phone_purity", "low", "high"))
        writer.writerows((r.run, r.step, r.layer, f"{r.value:.5f}", f"{r.low:.5f}", f"{r.high:.5f}") for r in purity)
