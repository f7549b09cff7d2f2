"""Reads what the stages left: every input may be absent, a broken one is refused by name."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espnet_mamba.data.files import read_json

SYSTEMS = ("pretrained", "random", "fbank")


@dataclass(frozen=True)
class ReportPaths:
    """Where the results stand; None or empty where there are none.

    ``targets`` that are empty, not None, say that this kind of model has none (SSAMBA).
    """

    stages_dir: Path | None = None
    targets: Sequence[Path] | None = None
    pretrain: Sequence[Path] = ()
    asr_dir: Path | None = None
    superb_dir: Path | None = None
    analysis_dir: Path | None = None
    efficiency_dir: Path | None = None
    configs: Sequence[Path] = ()


@dataclass(frozen=True)
class Results:
    """The results as read; empty where a stage has not run."""

    tag: str
    paths: ReportPaths
    stages: list[dict[str, Any]] = field(default_factory=list)
    targets: list[dict[str, Any]] = field(default_factory=list)
    training: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    asr: list[dict[str, Any]] = field(default_factory=list)
    superb: list[dict[str, Any]] = field(default_factory=list)
    purity: dict[str, Any] | None = None
    asr_difference: dict[str, float] | None = None
    superb_difference: dict[str, float] | None = None
    efficiency: list[dict[str, str]] = field(default_factory=list)


def read_results(tag: str, paths: ReportPaths) -> Results:
    """Read every result that is there; ValueError names a file that does not parse or lacks a field."""
    comparison = paths.analysis_dir / "purity_comparison.json" if paths.analysis_dir else None
    return Results(
        tag=tag,
        paths=paths,
        stages=sorted(_all(paths.stages_dir, "*.json", ("number", "name")), key=lambda record: record["number"]),
        targets=[
            {"folder": folder.name} | record
            for folder in paths.targets or ()
            for record in _all(folder, "quality.json", ("sets", "num_clusters"))
        ],
        training={folder.name: rows for folder in paths.pretrain if (rows := _training_log(folder))},
        asr=_by_system(_all(paths.asr_dir, "**/score.json", ("system", "wer", "cer"))),
        superb=_by_system(_all(paths.superb_dir, "**/result.json", ("task", "system", "value"))),
        purity=read_json(comparison) if comparison and comparison.is_file() else None,
        asr_difference=_difference(paths.asr_dir),
        superb_difference=_difference(paths.superb_dir),
        efficiency=_efficiency(paths.efficiency_dir),
    )


def _all(folder: Path | None, pattern: str, needed: Sequence[str]) -> list[dict[str, Any]]:
    if folder is None or not folder.is_dir():
        return []
    records = []
    for path in sorted(folder.glob(pattern)):
        record = read_json(path)
        absent = [name for name in needed if not isinstance(record, dict) or name not in record]
        if absent:
            raise ValueError(f"{path}: field {absent[0]!r} is missing; rerun the stage that writes it")
        records.append(record)
    return records


def _difference(folder: Path | None) -> dict[str, float] | None:
    """Return the paired difference pretrained - random that a stage left in ``comparison.json``, if it did."""
    path = folder / "comparison.json" if folder else None
    if path is None or not path.is_file():
        return None
    found = read_json(path)
    difference = found.get("difference") if found.get("against") == "random" else None
    return {key: difference[key] for key in ("value", "low", "high")} if difference else None


def _by_system(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(
        records,
        key=lambda record: (
            record.get("task", ""),
            SYSTEMS.index(record["system"]) if record["system"] in SYSTEMS else len(SYSTEMS),
            record["system"],
        ),
    )


def _training_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "train_log.jsonl"
    if not path.is_file():
        return []
    rows = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            # A run that was killed may leave half a line at the end; anywhere else it is damage.
            if line_number < len(path.read_text(encoding="utf-8").splitlines()):
                raise ValueError(
                    f"{path}, line {line_number}: not valid JSON; restore the file or leave it out"
                ) from None
    return rows


def _efficiency(folder: Path | None) -> list[dict[str, str]]:
    path = folder / "efficiency.csv" if folder else None
    if path is None or not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))
