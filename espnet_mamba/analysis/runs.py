"""Tables of several runs as one: systems of the same name are told apart by their run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from espnet_mamba.analysis.table import LayerValue, read_table_csv


def read_runs(paths: Sequence[str | Path], labels: Sequence[str] = ()) -> list[LayerValue]:
    """Read the tables of some runs; a system that several of them measured the same way is told apart by its run.

    ``labels`` name the runs (else the part of their folders that tells them apart; tables of one folder are one run).
    A system with the same values in all runs that hold it (the filterbank control) stays one.

    Raises:
        FileNotFoundError: a table that is not there.
        ValueError: labels that are not as many as the tables, an empty label, or a value that is there twice.
    """
    if labels and len(labels) != len(paths):
        raise ValueError(f"{len(labels)} names for {len(paths)} tables; give one for each, in the same order")
    if any(not label.strip() for label in labels):
        raise ValueError("a run's name is empty; give every table a name")
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: no such table; stage 11 (analysis) writes mutual_information.csv and others"
            )
    runs = [read_table_csv(path) for path in paths]
    names = list(labels) or _run_names([Path(path).resolve() for path in paths])
    for path, rows in zip(paths, runs, strict=True):
        _refuse_repeats(rows, str(path))
    joined = _join(names, runs)
    _refuse_repeats(joined, "two tables of one run (give each run its own --name)")
    return joined


def _join(names: Sequence[str], runs: Sequence[Sequence[LayerValue]]) -> list[LayerValue]:
    seen = Counter(_identity(row) for rows in runs for row in rows)
    shared = {identity[0] for identity, count in seen.items() if count > 1}
    texts: dict[str, dict[str, set[str]]] = {}  # system -> run -> its rows; as text, since nan is not equal to nan
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            texts.setdefault(row.system, {}).setdefault(name, set()).add(repr(row))
    alike = {name for name in shared if len(texts[name]) > 1 and len(set(map(frozenset, texts[name].values()))) == 1}
    joined: list[LayerValue] = []
    held: set[tuple[str, int, str, str, str]] = set()
    for name, rows in zip(names, runs, strict=True):
        for row in rows:
            if row.system in alike:
                if _identity(row) in held:
                    continue
                held.add(_identity(row))
            joined.append(replace(row, system=f"{name}: {row.system}") if row.system in shared - alike else row)
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
