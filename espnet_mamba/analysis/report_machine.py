"""Sections of what the run cost and ran on: efficiency, configuration, versions, stages."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from espnet_mamba.analysis.report_blocks import Block, Code, Figure, Missing, Section, Table, Text, duration, number
from espnet_mamba.analysis.report_inputs import Results

PACKAGES = ("espnet-mamba", "torch", "torchaudio", "numpy", "espnet", "s3prl", "sentencepiece", "matplotlib")


def efficiency_section(results: Results, out_dir: Path) -> Section:
    """Return cost against length: a table for each mode and batch, what was left out, the figures."""
    if not results.efficiency:
        return Section("Efficiency", [Missing("MACs, time and memory against length", "stage 12 (efficiency)")])
    blocks: list[Block] = []
    kinds = dict.fromkeys((row.get("mode", "eval"), row.get("batch", "one")) for row in results.efficiency)
    for mode, batch in kinds:
        own = [r for r in results.efficiency if (r.get("mode", "eval"), r.get("batch", "one")) == (mode, batch)]
        blocks.append(Text(f"{_MODES.get(mode, mode)}, {'one utterance' if batch == 'one' else 'a batch of them'}:"))
        blocks.append(_costs(own))
    folder = results.paths.efficiency_dir
    if folder and (folder / "left_out.csv").is_file():
        with open(folder / "left_out.csv", newline="", encoding="utf-8") as handle:
            blocks += [Text(row["note"]) for row in csv.DictReader(handle) if row.get("note")]
    if folder:
        figures = sorted(folder.glob("efficiency*.svg")) + [folder / "equal_parameters.svg", folder / "macs.svg"]
        blocks += [Figure(path, _caption(path.stem)) for path in figures if path.is_file()]
    return Section("Efficiency", blocks)


_MODES = {"eval": "Forward pass without gradients", "train": "Forward and backward pass"}


def _costs(rows: Sequence[Mapping[str, str]]) -> Table:
    cells = [
        [row["model"], f"{float(row['audio_seconds']):g}", row.get("batch_size", "1")]
        + [number(float(row["macs_per_second"]) / 1e9)]
        + [number(float(row["wall_median"]), float(row["wall_min"]), float(row["wall_max"]), digits=4)]
        + [number(float(row["rtf"]), digits=4), number(float(row["extra_memory_mb"]), digits=0)]
        + [row.get("num_threads", "–"), row.get("device", "–")]
        for row in rows
    ]
    header = ["model", "audio (s)", "utterances", "GMAC per s of audio", "wall time (s) [fastest, slowest]", "RTF"]
    return Table([*header, "peak memory (MiB)", "threads", "device"], cells, left=(0, 8))


def _caption(stem: str) -> str:
    if stem == "macs":
        return "Where the MACs are."
    if stem == "equal_parameters":
        return "Models of equal parameters: cost against length."
    what = "training step" if "_train" in stem else "forward pass"
    return f"Cost of the {what} against length; a cross ends a curve where the next length did not fit."


def configuration_section(results: Results, out_dir: Path) -> Section:
    """Return the YAML files as they are."""
    blocks: list[Block] = []
    for path in results.paths.configs:
        if path.is_file():
            blocks.append(Code(str(path), path.read_text(encoding="utf-8").rstrip()))
        else:
            blocks.append(Missing(str(path), "the recipe's conf folder"))
    return Section("Configuration", blocks or [Text("No configuration file was given to the report.")])


def versions_section(results: Results, out_dir: Path) -> Section:
    """Return packages and machine."""
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


def stages_section(results: Results, out_dir: Path) -> Section:
    """Return what ran, for how long, and how to rerun it."""
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
