"""Figures of cost against length (log axes) and of where the MACs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from espnet_mamba.efficiency.timing import Cost
from espnet_mamba.figures import save_figure

# Okabe and Ito's palette: told apart by readers with any common colour vision.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#F0E442",
    "#000000",
    "#999999",
    "#882255",
)
_MARKERS = "os^DvPX*hd"


def plot_costs(
    costs: Mapping[str, Sequence[Cost]], macs: Mapping[str, Sequence[float]], device: str, stem: str | Path
) -> list[Path]:
    """Draw real-time factor, MACs per second of audio, and peak memory against length; model -> values per length."""
    figure, panels = plt.subplots(1, 3, figsize=(11.5, 3.8), layout="constrained")
    for number, (name, rows) in enumerate(costs.items()):
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "markersize": 4}
        lengths = [row.audio_seconds for row in rows]
        panels[0].plot(lengths, [row.rtf for row in rows], label=name, **style)
        low, high = ([getattr(row, key) / row.audio_seconds for row in rows] for key in ("wall_min", "wall_max"))
        panels[0].fill_between(lengths, low, high, color=style["color"], alpha=0.18, linewidth=0)
        panels[1].plot(lengths, [value / 1e9 for value in macs[name]], label=name, **style)
        panels[2].plot(lengths, [row.extra_memory_mb for row in rows], label=name, **style)
    titles = ("real-time factor (band: fastest to slowest)", "work, by formula", "peak memory above the model at rest")
    labels = ("wall time / audio time", "GMAC per second of audio", "MiB")
    for panel, title, label in zip(panels, titles, labels, strict=True):
        panel.set(title=title, xlabel="length of the audio (s)", ylabel=label, xscale="log", yscale="log")
        panel.title.set_fontsize(9)
        panel.set_xticks(lengths, [f"{length:g}" for length in lengths])
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(*_at_least_a_decade(*panel.get_ylim()))
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8)
    figure.suptitle(f"forward pass of one utterance, {device}", fontsize=10)
    return save_figure(figure, stem)


def plot_parts(parts: Mapping[str, Mapping[str, float]], seconds: float, stem: str | Path) -> list[Path]:
    """Draw a bar per model of GMAC per second of audio by part; model -> part -> MACs per second."""
    figure, panel = plt.subplots(figsize=(8.5, 1.6 + 0.45 * len(parts)), layout="constrained")
    names = list(dict.fromkeys(part for own in parts.values() for part in own))
    for row, own in enumerate(parts.values()):
        left = 0.0
        for number, name in enumerate(names):
            value = own.get(name, 0.0) / 1e9
            hatch = "//" if number >= len(_COLOURS) else None
            colour = _COLOURS[number % len(_COLOURS)]
            panel.barh(row, value, left=left, color=colour, hatch=hatch, label=name if row == 0 else None, height=0.6)
            left += value
    panel.set_yticks(range(len(parts)), list(parts))
    panel.invert_yaxis()
    panel.set_xlabel(f"GMAC per second of audio at {seconds:g} s (scan counted as 3 MACs per frame, channel, state)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return save_figure(figure, stem)


def _at_least_a_decade(low: float, high: float) -> tuple[float, float]:
    """Widen limits that hold less than a factor of 10: a flat line should look flat."""
    middle = (low * high) ** 0.5
    return min(low, middle / 10**0.5), max(high, middle * 10**0.5)
