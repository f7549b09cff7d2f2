"""Training curves: loss and masked accuracy against optimiser step, one colour and marker per run."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from espnet_mamba.analysis.styles import styles_of
from espnet_mamba.data.files import atomic_path
from espnet_mamba.figures import save_figure

_MAX_POINTS = 1000
CURVES = (
    ("loss_masked", 1.0, "loss per masked frame (nats)"),
    ("accuracy_masked", 100.0, "accuracy at masked frames (%)"),
)


def plot_training(logs: Mapping[str, Sequence[Mapping[str, Any]]], stem: str | Path) -> Path:
    """Draw run -> rows of ``train_log.jsonl``: training thin, validation thick with marks; return the SVG's path.

    The points drawn are written to ``stem``.csv.
    """
    styles = styles_of(list(logs))
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4 + 0.2 * len(logs)), layout="constrained")
    drawn: list[tuple[str, str, str, float, float]] = []
    for panel, (key, scale, label) in zip(panels, CURVES, strict=True):
        for name, rows in logs.items():
            style = styles[name]
            for split, look in (
                ("train", {"linewidth": 0.8, "alpha": 0.6}),
                ("valid", {"linewidth": 1.8, "marker": style.marker, "markersize": 3.5}),
            ):
                points = [(row["step"], scale * row[key]) for row in rows if row.get("split") == split and key in row]
                points = points[:: max(1, len(points) // _MAX_POINTS)]
                if points:
                    panel.plot(*zip(*points, strict=True), color=style.colour, label=f"{name}, {split}", **look)
                    drawn += [(name, split, label, *point) for point in points]
        panel.set(xlabel="optimiser step", ylabel=label)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    with atomic_path(Path(f"{stem}.csv")) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("run", "split", "curve", "step", "value"))
        writer.writerows((*texts, step, f"{value:.6g}") for *texts, step, value in drawn)
    return save_figure(figure, stem)[0]
