"""The sections of the report, each from the results of one kind of stage."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from espnet_mamba.analysis.curves import plot_training
from espnet_mamba.analysis.report_blocks import (
    Block,
    Code,
    Figure,
    Missing,
    Section,
    Table,
    Text,
    duration,
    number,
    percent,
)
from espnet_mamba.analysis.report_inputs import SYSTEMS, Results
from espnet_mamba.analysis.table import read_table_csv

PACKAGES = ("espnet-mamba", "torch", "torchaudio", "numpy", "espnet", "s3prl", "sentencepiece", "matplotlib")
RULE = (
    "Intervals are 95 % bootstrap intervals over utterances. The last column says yes when the interval of the paired "
    "difference (both systems on the same resampled utterances; in brackets) leaves out 0, and, where no paired "
    "difference was measured, when the two systems' own intervals do not overlap. "
    "The layer is the one of highest phone purity on the set that k-means was fitted on; silence is left out."
)


def build_sections(results: Results, out_dir: Path) -> list[Section]:
    """Return all sections in order; figures that the report draws itself go to ``out_dir``."""
    builders: list[Callable[[Results, Path], Section]] = [
        _summary, _targets, _training, _asr, _superb, _layers, _efficiency, _configuration, _versions, _stages
    ]  # fmt: skip
    return [builder(results, out_dir) for builder in builders]


def _summary(results: Results, out_dir: Path) -> Section:
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


def _targets(results: Results, out_dir: Path) -> Section:
    title = "Targets quality"
    if not results.targets:
        return Section(title, [Missing("the quality of the targets", "stages 3 (targets1) and 5 (targets2)")])
    rows = [
        [record["folder"], _source(record), name, kind.replace("_", " "), str(record["num_clusters"])]
        + [str(quality.get("used_clusters", "–"))]
        + [percent(quality.get(key)) for key in ("purity", "cluster_purity", "pnmi")]
        + [str(quality.get("num_frames", "–"))]
        for record in results.targets
        for name, kinds in record["sets"].items()
        for kind, quality in (kinds if "purity" not in kinds else {"all": kinds}).items()
    ]
    if not rows:
        return Section(title, [Text("The data has no phones.ctm, so that purity and PNMI are not known.")])
    header = ["targets", "features", "set", "frames", "K", "used", "phone purity (%)", "cluster purity (%)", "PNMI (%)"]
    return Section(title, [Table([*header, "number of frames"], rows, left=(0, 1, 2, 3))])


def _source(record: dict[str, Any]) -> str:
    layer = record.get("layer")
    return Path(str(record.get("source", "–"))).name + (f", layer {layer}" if layer else "")


def _training(results: Results, out_dir: Path) -> Section:
    stages = "stages 4 (pretrain1) and 6 (pretrain2)"
    blocks: list[Block] = []
    if results.training:
        rows = [
            _training_row(name, split, own)
            for name, log in results.training.items()
            for split in ("train", "valid")
            if (own := [row for row in log if row.get("split") == split])
        ]
        header = ["run", "split", "last step", "loss", "loss of masked frames", "masked accuracy (%)", "time"]
        figure = plot_training(results.training, out_dir / "pretraining")
        blocks.append(Table(header, rows, left=(0, 1)))
        blocks.append(Figure(figure, "Loss and accuracy at masked frames against optimiser step."))
    for folder in results.paths.pretrain:
        if folder.name not in results.training:
            blocks.append(Missing(f"{folder}/train_log.jsonl", stages))
    return Section("Pretraining curves", blocks or [Missing("training logs", stages)])


def _training_row(name: str, split: str, rows: list[dict[str, Any]]) -> list[str]:
    last = rows[-1]
    time = duration(sum(row.get("seconds", 0.0) for row in rows)) if split == "train" else "–"
    losses = [number(last.get("loss")), number(last.get("loss_masked"))]
    return [name, split, str(last.get("step", "–")), *losses, percent(last.get("accuracy_masked")), time]


def _asr(results: Results, out_dir: Path) -> Section:
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


def _superb(results: Results, out_dir: Path) -> Section:
    if not results.superb:
        return Section("SUPERB", [Missing("results of the SUPERB heads", "stage 10 (superb)")])
    rows = [
        [r["task"], r["system"], r.get("metric", "accuracy"), percent(r["value"], r.get("low"), r.get("high"))]
        + [str(r.get("num_examples", r.get("num_utts", "–"))), str(r.get("num_utts", "–"))]
        for r in results.superb
    ]
    header = ["task", "system", "metric", "value (%)", "examples", "utterances"]
    return Section("SUPERB", [Table(header, rows, left=(0, 1, 2))])


def _layers(results: Results, out_dir: Path) -> Section:
    folder = results.paths.analysis_dir
    blocks: list[Block] = []
    for name, what, caption in (
        ("mutual_information", "mutual information per layer", _INFORMATION_CAPTION),
        ("purity", "phone purity per layer", "Phone purity, cluster purity and PNMI per layer, silence left out."),
    ):
        table = folder / f"{name}.csv" if folder else None
        if table is None or not table.is_file():
            blocks.append(Missing(what, "stage 11 (analysis); purity also needs phones.ctm in the data"))
            continue
        if (figure := table.with_suffix(".svg")).is_file():
            blocks.append(Figure(figure, caption))
        rows = [row for row in read_table_csv(table) if row.reference != "phones_and_silence"]
        cells = [
            [row.system, row.layer_name, row.measure.replace("_", " "), row.estimator, row.reference]
            + [number(row.value, row.low, row.high, digits=0 if row.unit == "clusters" else 3)]
            + [number(value, digits=0 if row.unit == "clusters" else 3) for value in (row.null, row.ceiling)]
            + [row.unit]
            for row in rows
        ]
        header = ["system", "layer", "measure", "estimator", "against", "value", "null", "ceiling", "unit"]
        blocks.append(Table(header, cells, left=(0, 1, 2, 3, 4, 8), folded=f"all values: {what}"))
    return Section("Layers", blocks)


_INFORMATION_CAPTION = (
    "Mutual information of each layer with layer 0 and with log-mel. The held-out bounds are lower bounds on unseen "
    "utterances and cannot pass the dotted ceiling; where they reach it, the truth may be any larger value. The "
    "published protocol measures on its own training frames and gives more than 0 for independent data too (dashed)."
)


def _efficiency(results: Results, out_dir: Path) -> Section:
    if not results.efficiency:
        return Section("Efficiency", [Missing("MACs, time and memory against length", "stage 12 (efficiency)")])
    rows = [
        [row["model"], f"{float(row['audio_seconds']):g}", number(float(row["macs_per_second"]) / 1e9)]
        + [number(float(row["wall_median"]), float(row["wall_min"]), float(row["wall_max"]), digits=4)]
        + [number(float(row["rtf"]), digits=4), number(float(row["extra_memory_mb"]), digits=0)]
        + [row.get("num_threads", "–"), row.get("device", "–")]
        for row in results.efficiency
    ]
    header = ["model", "audio (s)", "GMAC per s of audio", "wall time (s) [fastest, slowest]", "RTF"]
    blocks: list[Block] = [Table([*header, "peak memory (MiB)", "threads", "device"], rows, left=(0, 7))]
    folder = results.paths.efficiency_dir
    for name, caption in (("efficiency", "Cost of the forward pass against length."), ("macs", "Where the MACs are.")):
        if folder and (figure := folder / f"{name}.svg").is_file():
            blocks.append(Figure(figure, caption))
    return Section("Efficiency", blocks)


def _configuration(results: Results, out_dir: Path) -> Section:
    blocks: list[Block] = []
    for path in results.paths.configs:
        if path.is_file():
            blocks.append(Code(str(path), path.read_text(encoding="utf-8").rstrip()))
        else:
            blocks.append(Missing(str(path), "the recipe's conf folder"))
    return Section("Configuration", blocks or [Text("No configuration file was given to the report.")])


def _versions(results: Results, out_dir: Path) -> Section:
    rows = [["report written", datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")]]
    rows.append(["machine", f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {platform.system()}"])
    rows.append(["Python", platform.python_version()])
    for name in PACKAGES:
        try:
            rows.append([name, metadata.version(name)])
        except metadata.PackageNotFoundError:
            rows.append([name, "not installed"])
    return Section("Versions and machine", [Table(["what", "value"], rows, left=(0, 1))])


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _stages(results: Results, out_dir: Path) -> Section:
    if not results.stages:
        return Section("Stages", [Missing("stage records", "ssl.sh, as every stage ends")])
    rows = [
        [str(r["number"]), r["name"], r.get("status", "–"), duration(r.get("seconds") or 0.0)]
        + [number(r.get("peak_memory_mb"), digits=0), f"`{r.get('command', '–')}`"]
        for r in results.stages
    ]
    total = sum(r.get("seconds") or 0.0 for r in results.stages)
    peak = max(r.get("peak_memory_mb") or 0.0 for r in results.stages)
    rows.append(["", "all", "", duration(total), number(peak, digits=0), ""])
    header = ["stage", "name", "status", "time", "peak memory (MB)", "command that reruns it"]
    return Section("Stages", [Table(header, rows, left=(1, 2, 5))])
