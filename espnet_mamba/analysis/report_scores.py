"""Sections of scores: the controls against each other, ASR and SUPERB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espnet_mamba.analysis.report_blocks import Missing, Section, Table, Text, percent
from espnet_mamba.analysis.report_inputs import SYSTEMS, Results

RULE = (
    "Intervals are 95 % bootstrap intervals over utterances. The last column says yes when the interval of the paired "
    "difference (both systems on the same resampled utterances; in brackets) leaves out 0, and, where no paired "
    "difference was measured, when the two systems' own intervals do not overlap. "
    "The layer is the one of highest phone purity on the set that k-means was fitted on; silence is left out."
)


def summary_section(results: Results, out_dir: Path) -> Section:
    """Return the controls table: the three systems side by side, with a verdict."""
    controls = _controls(results)
    if not controls:
        stages = "stages 9 (asr_decode), 10 (superb) and 11 (analysis)"
        return Section("Summary", [Missing("the comparison of systems", stages)])
    present = [name for name in SYSTEMS if any(name in cells for _, cells, _ in controls)]
    rows = [[title, *(cells.get(name, "–") for name in present), verdict] for title, cells, verdict in controls]
    return Section("Summary", [Table(["measure", *present, "pretrained better than random?"], rows), Text(RULE)])


def _controls(results: Results) -> list[tuple[str, dict[str, str], str]]:
    """Return the rows of the controls table: (title, system -> cell, verdict)."""
    rows: list[tuple[str, dict[str, str], str]] = []
    if results.purity:
        best = results.purity.get("best_layers", {})
        rows.append(("best layer", {name: entry["layer_name"] for name, entry in best.items()}, "–"))
        for measure, title in (("phone_purity", "phone purity (%)"), ("pnmi", "PNMI (%)")):
            cells = {name: percent(**entry[measure]) for name, entry in best.items()}
            difference = results.purity.get("differences", {}).get("pretrained - random", {}).get(measure)
            clusters = results.purity.get("clusters")
            rows.append((f"{title}, K = {clusters}", cells, _verdict_of_difference(difference, True) or "–"))
    for task in dict.fromkeys(record["task"] for record in results.superb):
        records = {record["system"]: record for record in results.superb if record["task"] == task}
        metric = next(iter(records.values())).get("metric", "accuracy")
        row = _control(f"{task} {metric} (%)", records, ("value", "low", "high"), higher_is_better=True)
        rows.append((*row[:2], _verdict_of_difference(results.superb_difference, True) or row[2]))
    if results.asr:
        records = {record["system"]: record for record in results.asr}
        for rate in ("wer", "cer"):
            keys = (rate, f"{rate}_low", f"{rate}_high")
            row = _control(f"{rate.upper()} (%)", records, keys, higher_is_better=False)
            paired = results.asr_difference if rate == "wer" else None
            rows.append((*row[:2], _verdict_of_difference(paired, False) or row[2]))
    return rows


def _control(
    title: str, records: dict[str, Any], keys: tuple[str, str, str], higher_is_better: bool
) -> tuple[str, dict[str, str], str]:
    """Return a measure's values with intervals, and the verdict by overlap; ``keys`` name value, low and high."""
    cells = {name: percent(*(record.get(key) for key in keys)) for name, record in records.items()}
    both = [records[name] for name in ("pretrained", "random") if name in records]
    if len(both) < 2 or any(record.get(key) is None for record in both for key in keys):
        return title, cells, "–"
    sign = 1.0 if higher_is_better else -1.0
    ours, other = (sorted(sign * record[key] for key in keys) for record in both)
    return title, cells, "yes" if ours[0] > other[2] else "ahead, within the intervals" if ours[1] > other[1] else "no"


def _verdict_of_difference(difference: dict[str, float] | None, higher_is_better: bool) -> str | None:
    if difference is None:
        return None
    sign = 1.0 if higher_is_better else -1.0
    ours = sorted(sign * difference[key] for key in ("low", "value", "high"))
    verdict = "yes" if ours[0] > 0 else "ahead, within the interval" if ours[1] > 0 else "no"
    return f"{verdict} ({'+' if difference['value'] > 0 else ''}{percent(**difference)})"


def asr_section(results: Results, out_dir: Path) -> Section:
    """Return error rates per system."""
    if not results.asr:
        return Section("ASR", [Missing("ASR scores", "stages 8 (asr_train) and 9 (asr_decode)")])
    rows = [
        [r["system"], percent(r["wer"], r.get("wer_low"), r.get("wer_high"))]
        + [str(r.get(key, "–")) for key in ("substitutions", "insertions", "deletions", "num_words")]
        + [percent(r["cer"], r.get("cer_low"), r.get("cer_high")), str(r.get("num_utts", "–"))]
        for r in results.asr
    ]
    header = ["system", "WER (%)", "substitutions", "insertions", "deletions", "words", "CER (%)", "utterances"]
    return Section("ASR", [Table(header, rows)])


def superb_section(results: Results, out_dir: Path) -> Section:
    """Return the SUPERB heads' results."""
    if not results.superb:
        return Section("SUPERB", [Missing("results of the SUPERB heads", "stage 10 (superb)")])
    rows = [
        [r["task"], r["system"], r.get("metric", "accuracy"), percent(r["value"], r.get("low"), r.get("high"))]
        + [str(r.get("num_examples", r.get("num_utts", "–"))), str(r.get("num_utts", "–"))]
        for r in results.superb
    ]
    header = ["task", "system", "metric", "value (%)", "examples", "utterances"]
    return Section("SUPERB", [Table(header, rows, left=(0, 1, 2))])
