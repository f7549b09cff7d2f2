"""One panel of a figure: the values of one measure over layers, a line with an interval band per system.

The null is dashed, chance (the majority class) dash-dotted, the ceiling dotted, a value flagged as not to be believed
crossed. What would flatten the lines, a far ceiling or a value far below 0, is written instead of drawn.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from espnet_mamba.analysis.styles import GREY, Style
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.analysis.titles import flag_in_words

CHANCE = "majority"  # an estimator that is a line of another's panel
_FEW_TICKS = 7  # a small panel, where the first tick alone says what layer 0 is
_FAR = 3.0  # a ceiling this many times above the highest value, or a value as far below 0, is not drawn


@dataclass(frozen=True)
class Depth:
    """The x axis: layers ``first`` to ``last`` by number, or as shares of each system's last layer."""

    first: int
    last: int
    relative: bool = False

    @staticmethod
    def of(rows: Sequence[LayerValue], relative: bool = False) -> Depth:
        """Return the axis that holds all ``rows``; ValueError without any."""
        if not rows:
            raise ValueError("no rows to draw an axis for; give those of one measure")
        layers = [row.layer for row in rows]
        return Depth(min(layers), max(layers), relative and max(layers) > 0)

    def is_level(self, rows: Sequence[LayerValue]) -> bool:
        """Return whether a system's ``rows`` are a single layer among systems of several."""
        return len({row.layer for row in rows}) == 1 and self.last > self.first

    def places(self, rows: Sequence[LayerValue]) -> tuple[list[float], int]:
        """Return x of a system's ``rows`` and how often its values are repeated: a level goes across."""
        deepest = max(row.layer for row in rows) if self.relative else 1
        if self.is_level(rows):
            return ([0.0, 1.0] if self.relative else [self.first, self.last]), 2
        return [row.layer / max(1, deepest) for row in rows], 1


def draw_panel(
    panel: Axes, rows: Sequence[LayerValue], styles: Mapping[str, Style], relative: bool = False, num_ticks: int = 13
) -> list[str]:
    """Draw rows of one measure, estimator and reference, and of chance; return what is written instead of drawn.

    ``styles`` know every system of ``rows``; ``relative`` puts systems of different depth on one axis from 0 to 1.
    """
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    lines = [row for row in rows if row.estimator != CHANCE]
    if all(math.isnan(row.value) for row in lines):
        panel.text(0.5, 0.5, "no value", ha="center", va="center", transform=panel.transAxes, color="0.4")
        panel.set_xticks([])
        panel.set_yticks([])
        return []
    depth = Depth.of(lines, relative)
    for system in dict.fromkeys(row.system for row in lines):
        _draw_system(panel, [row for row in rows if row.system == system], styles[system], depth)
    notes = _limit_axis(panel, rows) + _draw_ceiling(panel, lines, styles, depth)
    flags = sorted({row.flag for row in lines if row.flag})
    if flags:
        notes.append(f"crossed: {', '.join(flag_in_words(flag) for flag in flags)}")
    _mark_layers(panel, depth, num_ticks)
    return notes


def _draw_system(panel: Axes, rows: Sequence[LayerValue], style: Style, depth: Depth) -> None:
    own = sorted((row for row in rows if row.estimator != CHANCE), key=lambda row: row.layer)
    chance = sorted((row for row in rows if row.estimator == CHANCE), key=lambda row: row.layer)
    x, repeat = depth.places(own)
    thin = {"color": style.colour, "linewidth": 0.9, "alpha": 0.8}
    if not all(math.isnan(row.null) for row in own):
        panel.plot(x, [row.null for row in own] * repeat, linestyle="--", **thin)
    if chance:
        places, times = depth.places(chance)
        panel.plot(places, [row.value for row in chance] * times, linestyle="-.", **thin)
    low, high = ([getattr(row, name) for row in own] * repeat for name in ("low", "high"))
    panel.fill_between(x, low, high, color=style.colour, alpha=0.09 if style.hollow else 0.18, linewidth=0)
    panel.plot(x, [row.value for row in own] * repeat, **style.line(with_marker=repeat == 1))
    crossed = [(place, row.value) for place, row in zip(x, own, strict=False) if row.flag]
    if crossed:
        panel.scatter(*zip(*crossed, strict=True), marker="x", s=34, color="black", linewidths=0.9, zorder=4)


def _limit_axis(panel: Axes, rows: Sequence[LayerValue]) -> list[str]:
    """Put 0 on the axis, and end it below 0 where a few values would flatten the rest."""
    values = [value for row in rows for value in (row.value, row.null) if not math.isnan(value)]
    ends = [value for row in rows for value in (row.low, row.high) if not math.isnan(value)]
    top, bottom = max(values + ends), min(values + ends)
    middle = statistics.median(row.value for row in rows if row.estimator != CHANCE and not math.isnan(row.value))
    if top > 0 and bottom < -_FAR * top and middle > -0.5 * top:
        panel.set_ylim(-0.5 * top, 1.06 * top)
        return (
            [f"down to {min(values):.3g}, below the axis"] if min(values) < -0.5 * top else ["a band leaves the axis"]
        )
    low, high = panel.get_ylim()
    panel.set_ylim(min(0.0, low), max(0.0, high))
    return []


def _draw_ceiling(panel: Axes, rows: Sequence[LayerValue], styles: Mapping[str, Style], depth: Depth) -> list[str]:
    ceilings = [row.ceiling for row in rows if not math.isnan(row.ceiling)]
    if not ceilings:
        return []
    heights = [value for row in rows for value in (row.value, row.high) if not math.isnan(value)]
    low, high = min(ceilings), max(ceilings)
    if high > _FAR * max(heights, default=0.0):
        return [f"ceiling {' to '.join(dict.fromkeys((f'{low:.3g}', f'{high:.3g}')))} off the axis"]
    if low == high:
        panel.axhline(low, color=GREY, linestyle=":", linewidth=1.2)
    else:
        for system in dict.fromkeys(row.system for row in rows):
            own = sorted((row for row in rows if row.system == system), key=lambda row: row.layer)
            x, repeat = depth.places(own)
            panel.plot(x, [row.ceiling for row in own] * repeat, color=styles[system].colour, ls=":", linewidth=1.2)
    panel.set_ylim(top=max(panel.get_ylim()[1], 1.03 * high))
    return []


def _mark_layers(panel: Axes, depth: Depth, num_ticks: int) -> None:
    if depth.relative:
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0\ninput", "¼", "½", "¾", "1"])
        panel.set_xlabel("layer / number of layers")
    else:
        step = max(1, math.ceil((depth.last - depth.first + 1) / num_ticks))
        ticks = list(range(depth.first, depth.last + 1, step))
        panel.set_xticks(ticks, [f"{tick}\ninput" if tick == 0 else str(tick) for tick in ticks])
        panel.set_xlabel("layer (0 = input of block 1)" if num_ticks > _FEW_TICKS else "layer")
    if depth.first == 0:
        panel.axvline(0, color=GREY, linewidth=0.7, alpha=0.6, zorder=0)


def legend_entries(
    panels: Sequence[Sequence[LayerValue]], styles: Mapping[str, Style], with_ceiling: bool = True
) -> list[Artist]:
    """Return an entry per system of the panels' rows, and one for each kind of line that is there."""
    handles: list[Artist] = []
    lines = [[row for row in rows if row.estimator != CHANCE] for rows in panels]
    every = [row for rows in lines for row in rows]
    for system in (name for name in styles if any(row.system == name for row in every)):
        levels = [Depth.of(rows).is_level([r for r in rows if r.system == system]) for rows in lines if rows]
        handles.append(Line2D([], [], label=system, **styles[system].line(with_marker=not any(levels))))
    if not all(math.isnan(row.low) for row in every):
        handles.append(Patch(color=GREY, alpha=0.25, linewidth=0, label="95 % interval"))
    kinds = (
        ("--", "null: shuffled, else the same", any(not math.isnan(row.null) for row in every)),
        ("-.", "chance: majority class", any(row.estimator == CHANCE for rows in panels for row in rows)),
        (":", "ceiling", with_ceiling and any(not math.isnan(row.ceiling) for row in every)),
    )
    handles += [
        Line2D([], [], color=GREY, linestyle=dashes, linewidth=1.0, label=label)
        for dashes, label, there in kinds
        if there
    ]
    if any(row.flag for row in every):
        handles.append(
            Line2D([], [], color="black", marker="x", linestyle="", markersize=5, label="flagged, see title")
        )
    return handles
