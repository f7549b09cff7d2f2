"""One table form for every measure per layer: the same columns whatever the measure, so that runs can be overlaid."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from espnet_mamba.data.files import atomic_path

_NAN = float("nan")


@dataclass(frozen=True)
class LayerValue:
    """One measured value of one layer of one system; ``nan`` stands for "does not apply".

    ``measure`` is what is measured, ``estimator`` how (with its setting, such as ``kmeans100``), ``reference`` against
    what (layer0, logmel, phones ...); ``low`` and ``high`` are the 95 % bootstrap interval over utterances, ``null``
    the value of the same procedure on data without the dependence, ``ceiling`` the most that the estimator can return.
    """

    system: str
    layer: int
    layer_name: str
    measure: str
    estimator: str
    reference: str
    value: float
    low: float = _NAN
    high: float = _NAN
    null: float = _NAN
    ceiling: float = _NAN
    unit: str = ""
    num_frames: int = 0
    num_utts: int = 0
    num_seeds: int = 1
    seed_sd: float = _NAN
    flag: str = ""  # why the value is not to be believed: ceiling, few_frames, components, bias; empty when it may be


COLUMNS = tuple(field.name for field in fields(LayerValue))
_INTEGERS = ("layer", "num_frames", "num_utts", "num_seeds")
_TEXTS = ("system", "layer_name", "measure", "estimator", "reference", "unit", "flag")


def write_table_csv(path: str | Path, rows: Iterable[LayerValue]) -> None:
    """Write rows as CSV with the columns of :class:`LayerValue`; nan becomes an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _to_cell(value) for name, value in asdict(row).items()})


def read_table_csv(path: str | Path) -> list[LayerValue]:
    """Read what :func:`write_table_csv` wrote; ValueError names the file and the missing column or bad cell."""
    with open(path, newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; rerun stage 11 (analysis), which writes it")
        return [_from_cells(path, number, cells) for number, cells in enumerate(reader, start=2)]


def _to_cell(value: str | int | float) -> str | int:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def _from_cells(path: str | Path, line: int, cells: dict[str, str]) -> LayerValue:
    try:
        values = {
            name: cells[name]
            if name in _TEXTS
            else int(cells[name])
            if name in _INTEGERS
            else float(cells[name] or "nan")
            for name in COLUMNS
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {line}: {error}; rerun stage 11 (analysis), which writes it") from error
    return LayerValue(**values)  # type: ignore[arg-type]
