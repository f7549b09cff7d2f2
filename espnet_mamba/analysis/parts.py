"""What is kept of each finished system, so that a stage that was killed goes on where it was.

A part is ``parts/<system>-<key>.json`` with the rows and an ``.npz`` with the counts. The key hangs on everything
that the values hang on: settings, utterances, label files, the model's files and this room's code. Another key is
another file, so a part is never taken for what it is not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from espnet_mamba.analysis.purity import LayerCounts
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.data.files import atomic_path, read_json, write_json

# Parts of the names of files that draw or report, and change no value.
_DRAWING = ("plot", "report", "panels", "styles", "titles", "runs", "curves", "comparison", "calibration", "overview")


@dataclass
class SystemResult:
    """What was measured of one system."""

    information: list[LayerValue] = field(default_factory=list)
    layers: list[LayerValue] = field(default_factory=list)
    counts: list[LayerCounts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def part_key(about: dict[str, Any], paths: Sequence[str | Path]) -> str:
    """Return 16 hex digits of ``about`` (anything JSON holds), the files at and below ``paths``, and the code.

    Files are told by name, size and time of change; those that do not exist count as absent.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode("utf-8"))
    for path in map(Path, paths):
        files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat() if file.is_file() else None
            digest.update(f"{file} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
    digest.update(_code())
    return digest.hexdigest()[:16]


@cache
def _code() -> bytes:
    """Return this room's code that makes values, read once: what runs is what stood there at the start."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return b"".join(file.read_bytes() for file in files if not any(word in file.stem for word in _DRAWING))


def part_path(out_dir: str | Path, system: str, key: str) -> Path:
    """Return where a system's part stands (.json; the counts beside it)."""
    return Path(out_dir) / "parts" / f"{re.sub(r'[^A-Za-z0-9_-]+', '-', system)}-{key}.json"


def write_part(path: Path, result: SystemResult) -> None:
    """Write a part; the JSON comes last, so that where it is the part is whole."""
    arrays = {str(number): layer.counts for number, layer in enumerate(result.counts)}
    with atomic_path(path.with_suffix(".npz")) as temporary:
        np.savez_compressed(temporary, **arrays)
    about = [
        {"system": x.system, "layer": x.layer, "layer_name": x.layer_name}
        | {"num_clusters": x.num_clusters, "fit_purity": x.fit_purity}
        for x in result.counts
    ]
    rows = {name: [asdict(row) for row in getattr(result, name)] for name in ("information", "layers")}
    write_json(path, rows | {"counts": about, "notes": result.notes})


def read_part(path: Path) -> SystemResult | None:
    """Return what :func:`write_part` wrote, digit by digit, or None where there is no part."""
    if not path.is_file():
        return None
    record = read_json(path)
    with np.load(path.with_suffix(".npz")) as arrays:
        counts = [LayerCounts(**about, counts=arrays[str(n)]) for n, about in enumerate(record["counts"])]
    rows = {name: [LayerValue(**row) for row in record[name]] for name in ("information", "layers")}
    return SystemResult(**rows, counts=counts, notes=record["notes"])
