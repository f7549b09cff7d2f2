"""What was measured so far, appended line by line, so that a run that was broken off goes on."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from espnet_mamba.data.files import write_text


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a model, how it is called, and on how much audio."""

    model: str
    mode: str  # eval or train
    batch: str  # one: a batch of one; seconds: as many utterances as fill a fixed number of seconds
    batch_size: int
    audio_seconds: float  # of each utterance

    @property
    def series(self) -> tuple[str, str, str]:
        """What a curve against length has in common."""
        return self.model, self.mode, self.batch

    @property
    def total_seconds(self) -> float:
        """Seconds of audio in one call."""
        return self.batch_size * self.audio_seconds


@dataclass(frozen=True)
class LeftOut:
    """A cell that was not measured, and why; longer ones of its series are left out with it."""

    cell: Cell
    reason: str  # memory, minutes or failed
    predicted: float  # MiB (memory) or seconds (minutes)
    limit: float
    note: str  # with the remedy

    def __str__(self) -> str:
        cell = self.cell
        return f"{cell.model}, {cell.mode}, {cell.batch_size} x {cell.audio_seconds:g} s: left out; {self.note}"


class Samples:
    """Memory, wall times and warm-up calls per cell, parameters per model; each addition is a line of a file."""

    def __init__(self, path: str | Path, setting: Mapping[str, Any]) -> None:
        """Read what an earlier run under the same ``setting`` (device, threads, versions) left in ``path``.

        Samples of another setting are not mixed in: their file is kept beside, as ``<name>.old``.
        """
        self.path = Path(path)
        self.memory: dict[Cell, tuple[float, float]] = {}  # peak, and above the state before, in MiB
        self.first_wall: dict[Cell, float] = {}  # seconds of the call in which memory was measured
        self.walls: dict[Cell, list[float]] = defaultdict(list)
        self.warm_ups: dict[Cell, int] = {}
        self.parameters: dict[str, int] = {}
        self.streaming: dict[str, list[dict[str, Any]]] = {}
        setting = json.loads(json.dumps(setting))
        lines = self._read()
        if lines and lines[0] != {"setting": setting}:
            old = self.path.with_suffix(".old")
            print(f"{self.path}: measured under another setting ({_difference(lines[0], setting)}); kept as {old.name}")
            self.path.replace(old)
            lines = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not lines:
            self._append({"setting": setting})
        for line in lines[1:]:
            self._take(line)

    @property
    def cells(self) -> list[Cell]:
        """Cells with at least one timed call."""
        return [cell for cell, walls in self.walls.items() if walls]

    def add(self, kind: str, value: Any, cell: Cell | None = None, model: str | None = None) -> None:
        """Keep a sample and write it; ``kind``: memory (peak, extra, wall), wall, warm_up, parameters, streaming."""
        line = {"kind": kind, "value": value} | ({"cell": asdict(cell)} if cell else {"model": model})
        self._take(json.loads(json.dumps(line)))
        self._append(line)

    def _take(self, line: dict[str, Any]) -> None:
        value = line["value"]
        cell = Cell(**line["cell"]) if "cell" in line else None
        if line["kind"] == "memory":
            self.memory[cell], self.first_wall[cell] = (value[0], value[1]), value[2]
        elif line["kind"] == "wall":
            self.walls[cell].append(value)
        elif line["kind"] == "warm_up":
            self.warm_ups[cell] = value
        elif line["kind"] == "streaming":
            self.streaming[line["model"]] = value
        else:
            self.parameters[line["model"]] = value

    def _read(self) -> list[dict[str, Any]]:
        if not self.path.is_file():
            return []
        lines = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # a line that a broken run did not finish; the next must not be added to it
                write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
                break
        return lines

    def _append(self, line: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")


def _difference(first: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    before = first.get("setting", {})
    keys = [key for key in {**before, **setting} if before.get(key) != setting.get(key)]
    return ", ".join(f"{key}: {before.get(key)}, now {setting.get(key)}" for key in keys) or "no setting line"
