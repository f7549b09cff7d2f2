"""Figures of cost against length (log axes), with the point where each curve ends, and of where the MACs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from espnet_mamba.efficiency.crossover import Crossover
from espnet_mamba.figures import save_figure

# Okabe and Ito's palette: told apart by readers with any common colour vision; its yellow is too pale for a line.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
    "#882255",
    "#332288",
)
_MARKERS = "os^DvPXhd*"
# The same colour in every figure; a family that is not here gets the next one.
_FAMILIES = (
    *("transformer", "extbimamba", "mamba", "innbimamba", "conbimamba", "causal_transformer", "mamba2", "mamba_mlp"),
    *("extbimamba_mlp", "innbimamba_mlp"),
)
_HATCHES = ("", "//", "..")
_SIZES = {"_base": "-", "_small": (0, (5, 2)), "_tiny": (0, (1, 1.5))}  # a size's dashes, whatever the family
_END = {"memory": "x", "minutes": "|", "failed": "1"}


class Curve(NamedTuple):
    """One model's costs against length, and where and why they end."""

    lengths: Sequence[float]
    rtf: Sequence[float]
    low: Sequence[float]  # fastest and slowest repeat, as real-time factors
    high: Sequence[float]
    gmacs: Sequence[float]  # per second of audio; nan without a formula
    memory_mb: Sequence[float]
    end: str | None  # memory, minutes, failed, or None: measured to the last length


def curves_of(
    rows: Sequence[Mapping[str, Any]], ends: Mapping[tuple[str, str, str], str], mode: str, batch: str
) -> dict[str, Curve]:
    """Return model -> curve from the rows of a table; ``ends``: (model, mode, batch) -> reason."""
    curves = {}
    own_rows = [row for row in rows if (row["mode"], row["batch"]) == (mode, batch)]
    for model in dict.fromkeys(row["model"] for row in own_rows):
        own = [row for row in own_rows if row["model"] == model]
        audio = [row["batch_size"] * row["audio_seconds"] for row in own]
        curves[model] = Curve(
            [row["audio_seconds"] for row in own],
            [row["rtf"] for row in own],
            [row["wall_min"] / seconds for row, seconds in zip(own, audio, strict=True)],
            [row["wall_max"] / seconds for row, seconds in zip(own, audio, strict=True)],
            [float(row["macs_per_second"]) / 1e9 for row in own],
            [row["extra_memory_mb"] for row in own],
            ends.get((model, mode, batch)),
        )
    return curves


def plot_costs(
    curves: Mapping[str, Curve], crossovers: Sequence[Crossover], title: str, stem: str | Path
) -> list[Path]:
    """Draw real-time factor, MACs per second of audio and peak memory against length; crossings as rings."""
    figure, panels = plt.subplots(1, 3, figsize=(12.5, 4.8), layout="constrained")
    styles = _styles(list(curves))
    for name, curve in curves.items():
        style = styles[name]
        panels[0].fill_between(curve.lengths, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        for panel, values in zip(panels, (curve.rtf, curve.gmacs, curve.memory_mb), strict=True):
            panel.plot(curve.lengths, values, label=name, markersize=4, linewidth=1.4, **style)
        if curve.end:
            for panel, values in ((panels[0], curve.rtf), (panels[2], curve.memory_mb)):
                _draw_end(panel, curve, values, style["color"])
    for crossing in crossovers:
        if {crossing.passes, crossing.passed} <= curves.keys():
            height = _at(curves[crossing.passes], crossing.seconds)
            panels[0].plot(crossing.seconds, height, "o", markersize=9, fillstyle="none", color="0.2", zorder=5)
    titles = ("real-time factor (band: fastest to slowest)", "work, by formula", "peak memory above the model at rest")
    labels = ("wall time / audio time", "GMAC per second of audio", "MiB")
    lengths = sorted({length for curve in curves.values() for length in curve.lengths})
    for panel, heading, label in zip(panels, titles, labels, strict=True):
        panel.set_title(heading, fontsize=9)
        panel.set(xlabel="length of the audio (s)", ylabel=label, xscale="log", yscale="log")
        _finish(panel, lengths)
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(
        handles=[*handles, *_signs(curves, bool(crossovers))], loc="outside lower center", ncols=4, fontsize=7
    )
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, stem)


def by_size(names: Sequence[str], most: int = 12) -> dict[str, list[str]]:
    """Split more curves than a figure can hold by size: ending of the figure's name -> models, all of them as ""."""
    groups = {"": list(names)}
    if len(groups[""]) > most:
        groups |= {size: [name for name in names if size in name] for size in _SIZES}
    return {size: own for size, own in groups.items() if own}


def plot_parts(parts: Mapping[str, Mapping[str, float]], seconds: float, stem: str | Path) -> list[Path]:
    """Draw a bar per model of GMAC per second of audio by part; model -> part -> MACs per second."""
    figure, panel = plt.subplots(figsize=(8.5, 1.6 + 0.36 * len(parts)), layout="constrained")
    names = list(dict.fromkeys(part for own in parts.values() for part in own))
    for number, name in enumerate(names):
        values = [own.get(name, 0.0) / 1e9 for own in parts.values()]
        left = [sum(own.get(other, 0.0) for other in names[:number]) / 1e9 for own in parts.values()]
        hatch = _HATCHES[number // len(_COLOURS) % len(_HATCHES)]
        colour = _COLOURS[number % len(_COLOURS)]
        panel.barh(range(len(parts)), values, left=left, color=colour, hatch=hatch, label=name, height=0.6)
    panel.set_yticks(range(len(parts)), list(parts), fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel(f"GMAC per second of audio at {seconds:g} s (scan counted as 3 MACs per frame, channel, state)")
    panel.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return save_figure(figure, stem)


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return name -> colour and marker of its family, dashes of its size; variants (after a colon) are hollow."""
    families = list(dict.fromkeys([*_FAMILIES, *(_family(name) for name in names)]))
    styles = {}
    for name in names:
        number = families.index(_family(name))
        style: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        style["linestyle"] = next((dashes for size, dashes in _SIZES.items() if size in name), "-")
        if ":" in name or name.endswith("_matched"):
            style |= {"fillstyle": "none", "linestyle": "-." if ":" in name else (0, (3, 1, 1, 1, 1, 1))}
        styles[name] = style
    return styles


def _family(name: str) -> str:
    name = name.split(":")[0].removesuffix("_matched").removesuffix("_paper")
    for size in _SIZES:
        name = name.removesuffix(size)
    return name


def _draw_end(panel: Axes, curve: Curve, values: Sequence[float], colour: str) -> None:
    panel.plot(curve.lengths[-1], values[-1], _END[curve.end], color=colour, markersize=11, markeredgewidth=2, zorder=4)


def _signs(curves: Mapping[str, Curve], with_rings: bool) -> list[Line2D]:
    meanings = {
        "memory": "ends: the next length does not fit into memory",
        "minutes": "ends: no time for the next length",
    }
    meanings["failed"] = "ends: the next length failed"
    ends = dict.fromkeys(curve.end for curve in curves.values() if curve.end)
    signs = [
        Line2D(
            [], [], color="0.2", marker=_END[end], linestyle="", markersize=9, markeredgewidth=2, label=meanings[end]
        )
        for end in ends
    ]
    if with_rings:
        ring = {"marker": "o", "fillstyle": "none", "markersize": 9, "linestyle": ""}
        signs.append(Line2D([], [], color="0.2", label="one model passes another", **ring))
    return signs


def _at(curve: Curve, seconds: float) -> float:
    """Return the real-time factor at a length, on the line drawn between measured ones."""
    points = list(zip(curve.lengths, curve.rtf, strict=True))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 <= seconds <= x1:
            return exp(log(y0) + (log(y1) - log(y0)) * (log(seconds) - log(x0)) / (log(x1) - log(x0)))
    return points[-1][1]


def _finish(panel: Axes, lengths: Sequence[float]) -> None:
    panel.set_xticks(lengths, [f"{length:g}" for length in lengths], fontsize=7, rotation=45)
    panel.set_ylim(*_at_least_a_decade(*panel.get_ylim()))
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _at_least_a_decade(low: float, high: float) -> tuple[float, float]:
    """Widen limits that hold less than a factor of 10: a flat line should look flat."""
    middle = (low * high) ** 0.5
    return min(low, middle / 10**0.5), max(high, middle * 10**0.5)
