"""Training curves: loss and masked accuracy against optimiser step, one colour per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from espnet_mamba.figures import save_figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MAX_POINTS = 1000


def plot_training(logs: Mapping[str, Sequence[Mapping[str, Any]]], stem: str | Path) -> Path:
    """Draw run -> rows of ``train_log.jsonl``: training thin, validation thick with dots; return the SVG's path."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    labels = ("loss per masked frame (nats)", "accuracy at masked frames (%)")
    for panel, key, scale, label in zip(panels, ("loss_masked", "accuracy_masked"), (1.0, 100.0), labels, strict=True):
        for number, (name, rows) in enumerate(logs.items()):
            colour = _COLOURS[number % len(_COLOURS)]
            for split, style in (
                ("train", {"linewidth": 0.8, "alpha": 0.6}),
                ("valid", {"linewidth": 1.8, "marker": "o"}),
            ):
                points = [(row["step"], scale * row[key]) for row in rows if row.get("split") == split and key in row]
                points = points[:: max(1, len(points) // _MAX_POINTS)]
                if points:
                    panel.plot(
                        *zip(*points, strict=True), color=colour, markersize=3, label=f"{name}, {split}", **style
                    )
        panel.set(xlabel="optimiser step", ylabel=label)
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
    return save_figure(figure, stem)[0]
