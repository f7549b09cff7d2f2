"""What a calibration showed: tables in Markdown and one figure, estimate against truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from espnet_mamba.analysis.calibration import CalibrationRow
from espnet_mamba.data.files import write_text
from espnet_mamba.figures import save_figure

# Okabe and Ito's palette, told apart by readers with any common colour vision; a marker each for grey print.
_STYLES = {
    "dv_heldout": ("#0072B2", "o", "Donsker-Varadhan, held-out"),
    "infonce_heldout": ("#009E73", "s", "InfoNCE, held-out"),
    "smile_heldout": ("#56B4E9", "^", "SMILE, held-out"),
    "nwj_heldout": ("#E69F00", "v", "NWJ, held-out"),
    "mine_paper": ("#D55E00", "P", "published protocol"),
    "mine_paper_reuse": ("#CC79A7", "X", "published protocol, one critic reused"),
}
_KSG_STYLES = (("#000000", "D"), ("0.5", "d"))  # the default number of components, and as many as the case has


def write_calibration(rows: Sequence[CalibrationRow], out_dir: str | Path) -> str:
    """Write ``calibration.md``, and ``calibration.svg`` and ``.png`` where there are Gaussians; return the Markdown."""
    text = render_calibration(rows)
    write_text(Path(out_dir) / "calibration.md", text)
    gaussians = [row for row in rows if row.section == "gaussians"]
    if gaussians:
        plot_calibration(gaussians, Path(out_dir) / "calibration")
    return text


def render_calibration(rows: Sequence[CalibrationRow]) -> str:
    """Return one table per section, in nats; sections without rows are left out."""
    tables: dict[str, tuple[str, Callable[[Sequence[CalibrationRow]], str]]] = {
        "gaussians": ("Correlated Gaussians", _gaussians),
        "coverage": ("Coverage of the 95 % interval", _coverage),
        "scaling": ("Either side scaled", _scaling),
        "chain": ("Data processing: nothing made from y knows more of x", _chain),
        "folded": ("No correlation: y = abs(x) + noise", _plain),
        "memory": ("Slow frames (each keeps 0.95 of the one before)", _plain),
        "codes": ("Labels through a noisy channel", _plain),
    }
    parts = []
    for section, (title, table) in tables.items():
        own = [row for row in rows if row.section == section]
        if own:
            parts.append(f"### {title}\n\n{table(own)}\n")
    return "\n".join(parts)


def verdict(row: CalibrationRow) -> str:
    """Say in a word whether the value is right (10 %, or 0.05 nats of nothing), flagged, or off without a flag."""
    if row.right:
        return "right"
    if row.flag:
        return f"flagged: {row.flag}"
    return "off"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}".replace("-0.000", "0.000")


def _cell(row: CalibrationRow) -> str:
    """Value and interval; bold when off without a flag, with the flag's name when there is one."""
    value = f"**{_number(row.value)}**" if verdict(row) == "off" else _number(row.value)
    flag = f" *{row.flag}*" if row.flag else ""
    return f"{value} [{_number(row.low)}, {_number(row.high)}]{flag}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = "|" + "|".join("---" for _ in head) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def _groups(rows: Sequence[CalibrationRow], key: Callable[[CalibrationRow], object]) -> list[list[CalibrationRow]]:
    found: dict[object, list[CalibrationRow]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.values())


def _range(values: Sequence[float]) -> str:
    texts = sorted({_number(value) for value in values}, key=lambda text: (len(text), text))
    return texts[0] if len(texts) == 1 else f"{_number(min(values))} to {_number(max(values))}"


def _gaussians(rows: Sequence[CalibrationRow]) -> str:
    truths = sorted({row.truth for row in rows})
    head = ["d", "estimator", *(f"I = {truth:g}" for truth in truths), "null", "ceiling", "frames"]
    lines = []
    for group in _groups(rows, lambda row: (row.dim, row.estimator)):
        by_truth = {row.truth: row for row in group}
        cells = [_cell(by_truth[truth]) if truth in by_truth else "-" for truth in truths]
        first = group[0]
        null, ceiling = _range([row.null for row in group]), _range([row.ceiling for row in group])
        lines.append([str(first.dim), first.estimator, *cells, null, ceiling, str(first.num_frames)])
    return _table(head, lines)


def _coverage(rows: Sequence[CalibrationRow]) -> str:
    head = ["d", "I", "estimator", "data sets", "truth in interval", "or flagged", "mean error", "spread", "half width"]
    lines = []
    for group in _groups(rows, lambda row: (row.dim, row.truth, row.estimator)):
        held = sum(row.covers for row in group)
        excused = sum(row.covers or bool(row.flag) for row in group)
        errors = np.array([row.value - row.truth for row in group])
        half = float(np.mean([0.5 * (row.high - row.low) for row in group]))
        spread = float(errors.std(ddof=1)) if len(errors) > 1 else math.nan
        first, numbers = group[0], [_number(value) for value in (float(errors.mean()), spread, half)]
        counts = [str(len(group)), str(held), str(excused)]
        lines.append([str(first.dim), f"{first.truth:g}", first.estimator, *counts, *numbers])
    return _table(head, lines)


def _scaling(rows: Sequence[CalibrationRow]) -> str:
    cases = list(dict.fromkeys(row.case for row in rows))
    head = ["estimator", *(case.removeprefix("scaled ") for case in cases), "largest shift", "half width", "within"]
    lines = []
    for group in _groups(rows, lambda row: row.estimator):
        values = {row.case: row.value for row in group}
        plain = group[0]
        half = 0.5 * (plain.high - plain.low)
        shift = max(abs(value - plain.value) for value in values.values())
        cells = [_number(values[case]) if case in values else "-" for case in cases]
        lines.append([plain.estimator, *cells, f"{shift:.2g}", _number(half), "yes" if shift <= half else "**no**"])
    return _table(head, lines)


def _chain(rows: Sequence[CalibrationRow]) -> str:
    labels = list(dict.fromkeys(row.label for row in rows))
    truths = {row.label: row.truth for row in rows}
    head = ["estimator", *(f"{label} ({truths[label]:.3f})" for label in labels), "holds"]
    lines = []
    for group in _groups(rows, lambda row: row.estimator):
        first, *later = (next(row for row in group if row.label == label) for label in labels)
        # Within intervals: what is made from y may be above y by no more than the intervals overlap.
        holds = all(row.low <= first.high for row in later)
        lines.append([first.estimator, _cell(first), *(_cell(row) for row in later), "yes" if holds else "**no**"])
    return _table(head, lines)


def _plain(rows: Sequence[CalibrationRow]) -> str:
    labels = list(dict.fromkeys(row.label for row in rows))
    truths = {row.label: row.truth for row in rows}
    head = ["estimator", *(f"{label} (truth {truths[label]:.3f})" for label in labels), "null"]
    lines = []
    for group in _groups(rows, lambda row: row.estimator):
        cells = [_cell(next(row for row in group if row.label == label)) for label in labels]
        lines.append([group[0].estimator, *cells, _range([row.null for row in group])])
    return _table(head, lines)


def plot_calibration(rows: Sequence[CalibrationRow], stem: str | Path) -> list[Path]:
    """Draw estimate against truth, one panel per width: intervals, the identity line, ceilings; hollow when flagged."""
    dims = sorted({row.dim for row in rows})
    figure, axes = plt.subplots(
        1, len(dims), figsize=(3.7 * len(dims) + 0.4, 4.6), squeeze=False, layout="constrained", sharey=True
    )
    for panel, dim in zip(axes[0], dims, strict=True):
        _draw_panel(panel, [row for row in rows if row.dim == dim])
        panel.set_title(f"{dim} + {dim} dimensions" if dim > 1 else "1 + 1 dimension", fontsize=10)
        panel.set_xlabel("true information (nats)")
    axes[0, 0].set_ylabel("estimate (nats)")
    handles: dict[str, object] = {}
    for panel in axes[0]:
        handles.update({str(line.get_label()): line for line in panel.get_legend_handles_labels()[0]})
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return save_figure(figure, stem)


def _draw_panel(panel: Axes, rows: Sequence[CalibrationRow]) -> None:
    truths = sorted({row.truth for row in rows})
    top = max([*truths, *(row.value for row in rows)])
    step = 0.016 * max(top, 1.0)
    panel.plot([0, max(truths)], [0, max(truths)], color="0.4", linewidth=1.0, zorder=1, label="estimate = truth")
    groups = _groups(rows, lambda row: row.estimator)
    for number, group in enumerate(groups):
        name = group[0].estimator
        if name.startswith("ksg"):
            count = name.removeprefix("ksg")
            style = (*_KSG_STYLES[count != "4"], f"nearest neighbours, {count} components")
        else:
            style = _STYLES[name]
        # Side by side, or the four bounds would lie on each other.
        shift = (number - 0.5 * (len(groups) - 1)) * step
        _draw_estimator(panel, group, shift, style)
    held_out = [row.ceiling for row in rows if row.estimator.endswith("_heldout")]
    published = [row.ceiling for row in rows if row.estimator.startswith("mine_paper")]
    for values, colour, label in ((held_out, "0.35", "ceiling, held-out"), (published, "#D55E00", "ln N, published")):
        if values:
            panel.axhline(max(values), color=colour, linestyle=":", linewidth=1.2, label=label)
    panel.plot([], [], color="0.3", marker="o", markerfacecolor="white", linestyle="", label="hollow: flagged")
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_estimator(panel: Axes, group: Sequence[CalibrationRow], shift: float, style: tuple[str, str, str]) -> None:
    colour, marker, label = style
    place = [row.truth + shift for row in group]
    values = [row.value for row in group]
    reach = [[max(0.0, row.value - row.low) for row in group], [max(0.0, row.high - row.value) for row in group]]
    panel.errorbar(place, values, np.nan_to_num(reach), fmt="none", ecolor=colour, elinewidth=1.0, alpha=0.8)
    for flagged in (False, True):
        chosen = [(x, row.value) for x, row in zip(place, group, strict=True) if bool(row.flag) is flagged]
        if chosen:
            face = "white" if flagged else colour
            panel.plot(*zip(*chosen, strict=True), marker=marker, markersize=5, linestyle="", color=colour, mfc=face)
    panel.plot([], [], marker=marker, markersize=5, linestyle="", color=colour, label=label)
