"""Overlays of runs: one figure per measure, estimator and reference, with the numbers of the figure beside it.

Layers on x (layer 0, the input of block 1, marked), a line with an interval band per system, the null dashed, chance
(the majority class) dash-dotted, the ceiling dotted. Legends stand under the axes, where no line is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from espnet_mamba.analysis.plots import style_of
from espnet_mamba.analysis.table import LayerValue, read_table_csv, write_table_csv
from espnet_mamba.figures import save_figure

CHANCE = "majority"  # an estimator that is a line of another's figure
# Okabe and Ito's palette without its yellow, which a white page hides. The number of markers has no factor in common
# with that of colours, so 56 systems differ in at least one of the two.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FIXED = ("pretrained", "random", "fbank")  # look as in the figures of the analysis stage
_GREY = "0.35"
_FAR = 3.0  # a ceiling this many times above the highest value would flatten the lines; it is written instead
_TITLES = {
    "mutual_information": "mutual information",
    "phone_purity": "phone purity",
    "cluster_purity": "cluster purity",
    "pnmi": "phone-normalised mutual information",
    "used_clusters": "used clusters",
    "reconstruction": "reconstruction",
    "phone_accuracy": "phone accuracy",
    "speaker_accuracy": "speaker accuracy",
    "mine_paper": "published protocol (training frames)",
    "mine_paper_reuse": "published protocol, one critic reused",
    "dv_heldout": "Donsker-Varadhan bound, held out",
    "infonce_heldout": "InfoNCE bound, held out",
    "smile_heldout": "SMILE, held out",
    "nwj_heldout": "NWJ bound, held out",
    "ridge": "linear decoder (ridge), held out",
    "mlp": "ridge and one hidden layer, held out",
    "lda": "linear probe, held out",
    "logmel": "log-mel",
    "layer0": "layer 0",
    "phones_and_silence": "phones and silence",
}
_IMPLIED = ("phones", "speakers")  # what the measure's own name says
_JOINERS = {"reconstruction": "of"}


@dataclass(frozen=True)
class Style:
    """How a system's line looks."""

    colour: str
    marker: str
    hollow: bool  # a random-weight twin: its sibling's colour and marker, unfilled


def read_runs(paths: Sequence[str | Path], labels: Sequence[str] = ()) -> list[LayerValue]:
    """Read the tables of some runs; a system that several of them measured the same way is told apart by its run.

    ``labels`` name the runs (else the part of their folders that tells them apart; tables of one folder are one run).
    ValueError for a number of labels that is not that of the tables and for a value that is there twice.
    """
    if labels and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} names for {len(paths)} tables; give one for each, in the same order")
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no such table; stage 11 (analysis) writes mutual_information.csv and others"
            )
    runs = [read_table_csv(path) for path in paths]
    names = list(labels) or _run_names([Path(path).resolve() for path in paths])
    for path, rows in zip(paths, runs, strict=True):
        _refuse_repeats(rows, str(path))
    seen = Counter(_identity(row) for rows in runs for row in rows)
    shared = {identity[0] for identity, count in seen.items() if count > 1}
    joined = [
        replace(row, system=f"{name}: {row.system}") if row.system in shared else row
        for name, rows in zip(names, runs, strict=True)
        for row in rows
    ]
    _refuse_repeats(joined, "two tables of one run (give each run its own --name)")
    return joined


def _identity(row: LayerValue) -> tuple[str, int, str, str, str]:
    return row.system, row.layer, row.measure, row.estimator, row.reference


def _refuse_repeats(rows: Sequence[LayerValue], where: str) -> None:
    for key, count in Counter(map(_identity, rows)).most_common(1):
        if count > 1:
            raise ValueError(f"{where}: {count} rows for {' '.join(map(str, key))}; one is expected")


def _run_names(paths: Sequence[Path]) -> list[str]:
    """Return the part of each folder's path, counted from its end, that no other folder shares; else the folder.

    Tables that all lie in one folder are told apart by their own names.
    """
    folders = list(dict.fromkeys(path.parent for path in paths))
    if len(folders) == 1:
        return [path.stem for path in paths]
    for depth in range(1, max(len(folder.parts) for folder in folders)):
        parts = {folder: folder.parts[-depth] if depth < len(folder.parts) else "" for folder in folders}
        if len(set(parts.values())) == len(folders):
            return [parts[path.parent] for path in paths]
    return [str(path.parent) for path in paths]


def plot_layers(rows: Sequence[LayerValue], out_dir: str | Path) -> list[Path]:
    """Write ``<measure>_<estimator>_<reference>`` .svg, .png and .csv for every kind of value; return the paths.

    The figure is drawn from the CSV as it was written. ValueError when there is nothing to draw.
    """
    kinds = list(dict.fromkeys((row.measure, row.estimator, row.reference) for row in rows if row.estimator != CHANCE))
    if not kinds:
        raise ValueError("the tables hold no rows to draw; look whether stage 11 (analysis) measured anything")
    styles = styles_of(list(dict.fromkeys(row.system for row in rows)))
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for measure, estimator, reference in kinds:
        same = [row for row in rows if (row.measure, row.reference) == (measure, reference)]
        drawn = [row for row in same if row.estimator in (estimator, CHANCE)]
        stem = Path(out_dir) / re.sub(r"[^\w.-]+", "-", f"{measure}_{estimator}_{reference}")
        table = Path(f"{stem}.csv")
        write_table_csv(table, drawn)
        written += [*save_figure(_figure(read_table_csv(table), styles), stem), table]
    return written


def styles_of(systems: Sequence[str]) -> dict[str, Style]:
    """Return a style per system; ``X random`` (or X_random, X-random) is drawn as X, hollow, when X is there too."""
    styles: dict[str, Style] = {}
    twins = {name: re.sub(r"[ _-]?random$", "", name) for name in systems}
    others = [name for name in systems if name not in _FIXED and (twins[name] == name or twins[name] not in systems)]
    taken = [style_of(name, systems)[0] for name in _FIXED if name in systems]
    free = [colour for colour in _COLOURS if colour not in taken] + taken
    for index, name in enumerate(others):
        styles[name] = Style(free[index % len(free)], _MARKERS[index % len(_MARKERS)], hollow=False)
    for name in systems:
        if name in _FIXED:
            styles[name] = Style(*style_of(name, systems), hollow=False)
        elif name not in styles:
            styles[name] = replace(styles[twins[name]], hollow=True)
    return {name: styles[name] for name in systems}


def _figure(rows: Sequence[LayerValue], styles: Mapping[str, Style]) -> plt.Figure:
    """Draw the rows of one kind (and of chance)."""
    lines = [row for row in rows if row.estimator != CHANCE]
    systems = list(dict.fromkeys(row.system for row in lines))
    figure, panel = plt.subplots(figsize=(6.4, 3.6 + 0.2 * math.ceil(len(systems) / 3)), layout="constrained")
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)
    span = (min(row.layer for row in lines), max(row.layer for row in lines))
    for system in systems:
        _draw_system(panel, [row for row in rows if row.system == system], styles[system], span)
    shown = {system: styles[system] for system in systems}
    notes = _draw_ceiling(panel, lines, shown, span)
    handles = _legend(rows, shown, span, with_ceiling=not notes)
    _mark_layers(panel, span)
    first = lines[0]
    unit = f" ({first.unit.replace('^2', '²')})" if first.unit else ""
    panel.set_ylabel(f"{_title(first.measure)}{unit}")
    about = "" if first.reference in _IMPLIED else f" {_JOINERS.get(first.measure, 'with')} {_title(first.reference)}"
    head = f"{_title(first.measure)}{about}: {_title(first.estimator)}"
    counts = sorted({row.num_utts for row in lines})
    notes.append(f"{'-'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} utterances")
    panel.set_title(f"{head[:1].upper()}{head[1:]}\n{', '.join(notes)}", fontsize=9)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _title(name: str) -> str:
    clusters = re.fullmatch(r"kmeans(\d+)", name)
    return f"k-means, K = {clusters[1]}" if clusters else _TITLES.get(name, name.replace("_", " "))


def _draw_system(panel: Axes, rows: Sequence[LayerValue], style: Style, span: tuple[int, int]) -> None:
    """Draw one system; a system of one layer (filterbanks) goes across as a level to compare with."""
    own = sorted((row for row in rows if row.estimator != CHANCE), key=lambda row: row.layer)
    chance = sorted((row for row in rows if row.estimator == CHANCE), key=lambda row: row.layer)
    is_level = _is_level(own, span)
    for part, kind in ((own, "value"), (own, "null"), (chance, "chance")):
        if not part:
            continue
        layers = list(span) if is_level else [row.layer for row in part]
        repeat = 2 if is_level else 1
        values = [row.null if kind == "null" else row.value for row in part] * repeat
        if all(map(math.isnan, values)):
            continue
        if kind != "value":
            panel.plot(layers, values, color=style.colour, linestyle="--" if kind == "null" else "-.", linewidth=0.9)
            continue
        low, high = ([getattr(row, name) for row in part] * repeat for name in ("low", "high"))
        panel.fill_between(layers, low, high, color=style.colour, alpha=0.09 if style.hollow else 0.18, linewidth=0)
        panel.plot(layers, values, **_line(style, marker=not is_level))


def _is_level(rows: Sequence[LayerValue], span: tuple[int, int]) -> bool:
    """Return whether a system's rows of one kind are a single layer among systems of several."""
    return len({row.layer for row in rows}) == 1 and span[1] > span[0]


def _line(style: Style, marker: bool = True) -> dict[str, object]:
    return {
        "color": style.colour,
        "marker": style.marker if marker else None,
        "markerfacecolor": "white" if style.hollow else style.colour,
        "markersize": 4.5,
        "linewidth": 1.0 if style.hollow else 1.6,
    }


def _draw_ceiling(
    panel: Axes, rows: Sequence[LayerValue], styles: Mapping[str, Style], span: tuple[int, int]
) -> list[str]:
    """Draw the ceiling where it does not flatten the lines; return it as a note where it would."""
    ceilings = [row.ceiling for row in rows if not math.isnan(row.ceiling)]
    heights = [value for row in rows for value in (row.value, row.high) if not math.isnan(value)]
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom=min(0.0, bottom), top=max(0.0, top))
    if not ceilings:
        return []
    if max(ceilings) > _FAR * max(heights, default=0.0):
        ends = dict.fromkeys((f"{min(ceilings):.3g}", f"{max(ceilings):.3g}"))
        return [f"ceiling {' to '.join(ends)} is above the axis"]
    if min(ceilings) == max(ceilings):
        panel.axhline(ceilings[0], color=_GREY, linestyle=":", linewidth=1.2)
    else:
        for system, style in styles.items():
            own = sorted((row for row in rows if row.system == system), key=lambda row: row.layer)
            layers = list(span) if _is_level(own, span) else [row.layer for row in own]
            levels = [row.ceiling for row in own] * (len(layers) // max(1, len(own)))
            panel.plot(layers, levels, color=style.colour, linestyle=":", linewidth=1.2)
    bottom, top = panel.get_ylim()
    panel.set_ylim(top=max(top, 1.03 * max(ceilings)))
    return []


def _mark_layers(panel: Axes, span: tuple[int, int]) -> None:
    first, last = span
    ticks = list(range(first, last + 1, max(1, math.ceil((last - first + 1) / 13))))
    panel.set_xticks(ticks, [f"{tick}\ninput" if tick == 0 else str(tick) for tick in ticks])
    if first == 0:
        panel.axvline(0, color=_GREY, linewidth=0.7, alpha=0.6, zorder=0)
    panel.set_xlabel("layer (0 = input of block 1)")


def _legend(
    rows: Sequence[LayerValue], styles: Mapping[str, Style], span: tuple[int, int], with_ceiling: bool
) -> list[Artist]:
    """Return an entry per system, and one for each kind of line that is there."""
    lines = [row for row in rows if row.estimator != CHANCE]
    handles: list[Artist] = []
    for name, style in styles.items():
        is_level = _is_level([row for row in lines if row.system == name], span)
        handles.append(Line2D([], [], label=name, **_line(style, marker=not is_level)))
    if not all(math.isnan(row.low) for row in lines):
        handles.append(Patch(color=_GREY, alpha=0.25, linewidth=0, label="95 % interval"))
    if not all(math.isnan(row.null) for row in lines):
        handles.append(
            Line2D([], [], color=_GREY, linestyle="--", linewidth=0.9, label="null: shuffled, else the same")
        )
    if len(lines) < len(rows):
        handles.append(Line2D([], [], color=_GREY, linestyle="-.", linewidth=0.9, label="chance: majority class"))
    if with_ceiling and not all(math.isnan(row.ceiling) for row in lines):
        handles.append(Line2D([], [], color=_GREY, linestyle=":", linewidth=1.2, label="ceiling"))
    return handles
