"""The measured costs as rows of CSV and as Markdown."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from espnet_mamba.data.files import atomic_path
from espnet_mamba.efficiency.entries import Entry
from espnet_mamba.efficiency.samples import Cell, LeftOut, Samples

PAPER_LENGTHS = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)  # arXiv 2506.12606's figure of MACs and RTF
# What that figure shows, by mixer; its numbers were not at hand, so that no number stands here (docs/papers.md 8).
PAPER_ROW = {
    "mamba": "flat to 320 s",
    "extbimamba": "flat to 320 s",
    "attention": "rises",
    "causal_attention": "rises; out of memory from 80 s on (48 GB GPU)",
}
_ONE = ("eval", "one")


def cost_rows(entries: Sequence[Entry], samples: Samples, device: str, num_threads: int) -> list[dict[str, Any]]:
    """Return a row per cell with timed calls, in the order of the entries, modes, batches and lengths.

    ``wall_*`` are seconds of one call on the whole batch, ``rtf`` is wall time over all audio in it,
    ``macs_per_second`` per second of audio of a forward pass (nan without a formula), memory in MiB.
    """
    by_name = {entry.name: entry for entry in entries}
    order = list(by_name)
    cells = [cell for cell in samples.cells if cell.model in by_name]
    cells.sort(key=lambda c: (order.index(c.model), c.mode, c.batch, c.audio_seconds))
    return [_row(cell, by_name[cell.model], samples, device, num_threads) for cell in cells]


def _row(cell: Cell, entry: Entry, samples: Samples, device: str, num_threads: int) -> dict[str, Any]:
    walls = samples.walls[cell]
    parts = entry.macs_per_second(cell.audio_seconds)
    peak, extra = samples.memory[cell]
    middle = statistics.median(walls)
    low, _, high = statistics.quantiles(walls, n=4, method="inclusive") if len(walls) > 1 else (walls[0],) * 3
    return {
        "model": cell.model,
        "num_parameters": samples.parameters[cell.model],
        "device": device,
        "num_threads": num_threads,
        "mode": cell.mode,
        "batch": cell.batch,
        "batch_size": cell.batch_size,
        "macs_per_second": round(sum(parts.values())) if parts else "nan",
        "audio_seconds": cell.audio_seconds,
        "wall_median": _short(middle),
        "wall_min": _short(min(walls)),
        "wall_max": _short(max(walls)),
        "wall_quartile1": _short(low),
        "wall_quartile3": _short(high),
        "rtf": _short(middle / cell.total_seconds),
        "peak_memory_mb": _short(peak),
        "extra_memory_mb": _short(extra),
        "num_repeats": len(walls),
        "num_warm_up": samples.warm_ups[cell],
    }


def left_out_rows(left_out: Sequence[LeftOut]) -> list[dict[str, Any]]:
    """Return a row per series that ended: its first length that was not measured, and why."""
    keys = ("model", "mode", "batch", "batch_size", "audio_seconds")
    return [
        {key: getattr(left.cell, key) for key in keys}
        | {"reason": left.reason, "predicted": _short(left.predicted), "limit": _short(left.limit), "note": left.note}
        for left in left_out
    ]


def macs_rows(entries: Sequence[Entry], lengths: Sequence[float]) -> list[dict[str, Any]]:
    """Return model, audio_seconds, part and macs_per_second, for every model with a formula."""
    return [
        {"model": entry.name, "audio_seconds": seconds, "part": part, "macs_per_second": round(macs)}
        for entry in entries
        if entry.config is not None
        for seconds in lengths
        if round(seconds * 16000) >= entry.shortest_samples
        for part, macs in entry.macs_per_second(seconds).items()
    ]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the keys of the first; without rows the file is removed, so that no old one is believed."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def markdown(
    entries: Sequence[Entry], rows: Sequence[Mapping[str, Any]], left_out: Sequence[LeftOut], key: str, title: str
) -> str:
    """Return a Markdown table of one cost (``key`` of a row) against length, for each mode and batch that was measured.

    What ended a series stands where its next value would: mem (memory), time (minutes) or failed. The last column says
    what paper 2's figure shows of the same kind of model.
    """
    blocks = []
    for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in rows):
        own = [row for row in rows if (row["mode"], row["batch"]) == (mode, batch)]
        ends = {left.cell.model: left for left in left_out if (left.cell.mode, left.cell.batch) == (mode, batch)}
        lengths = sorted({row["audio_seconds"] for row in own} | {left.cell.audio_seconds for left in ends.values()})
        with_paper = (mode, batch) == _ONE and key == "rtf"
        header = ["model", "parameters (M)", *(f"{length:g} s" for length in lengths)]
        header += ["paper 2 (5 to 320 s)"] if with_paper else []
        lines = [f"{title}, {mode}, batch of {'one' if batch == 'one' else 'fixed seconds'}", ""]
        lines += [f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
        for entry in entries:
            values = {row["audio_seconds"]: row for row in own if row["model"] == entry.name}
            if not values:
                continue
            end = ends.get(entry.name)
            cells = [_cell(values.get(length), end, length, key) for length in lengths]
            cells += [_paper(entry)] if with_paper else []
            size = next(iter(values.values()))["num_parameters"] / 1e6
            lines.append(f"| `{entry.name}` | {size:.2f} | {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _cell(row: Mapping[str, Any] | None, end: LeftOut | None, length: float, key: str) -> str:
    if row is not None:
        value = float(row[key])
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    if end is not None and length >= end.cell.audio_seconds:
        return {"memory": "mem", "minutes": "time"}.get(end.reason, "failed")
    return "–"


def _paper(entry: Entry) -> str:
    mixer = getattr(entry.config, "mixer", "")
    plain = getattr(entry.config, "block", "") == "plain" and not (entry.same_weights_as or entry.is_peer)
    return PAPER_ROW.get(mixer, "–") if plain else "–"


def _short(value: float) -> float:
    return float(f"{value:.6g}")
