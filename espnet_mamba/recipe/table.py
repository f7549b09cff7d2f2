"""The stages of a recipe as data: ``egs2/TEMPLATE/ssl1/stages.tsv``, which engine, --help and tests read."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from espnet_mamba.names import nearest

VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True)
class Stage:
    """One row. Paths are templates such as ``${dumpdir}/raw/train`` over the engine's variables."""

    number: int
    name: str
    group: str  # data_prep, train or eval: what ESPnet's --skip_data_prep, --skip_train and --skip_eval skip
    work_dir: str  # folder that a killed run is resumed in; empty: the stage starts over
    needs: tuple[str, ...]
    makes: tuple[str, ...]
    purpose: str

    def applying(self, paths: Sequence[str], variables: Mapping[str, str]) -> list[str]:
        """Return the templates that this run has: one that names an empty variable is left out, as the targets of a
        model that predicts none are; KeyError when the engine did not set one."""
        return [path for path in paths if all(variables[name] for name in VARIABLE.findall(path))]

    def expand(self, paths: Sequence[str], variables: Mapping[str, str]) -> list[Path]:
        """Fill in ``variables`` where they apply; KeyError when the engine did not set one."""
        return [Path(Template(path).substitute(variables)) for path in self.applying(paths, variables)]


def read_table(path: str | Path) -> list[Stage]:
    """Read the stage table, in order."""
    with open(path, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    return [
        Stage(
            int(row["number"]),
            row["name"],
            row["group"],
            row["work_dir"],
            tuple(row["needs"].split()),
            tuple(row["makes"].split()),
            row["purpose"],
        )
        for row in rows
    ]


def find_stage(table: Sequence[Stage], name: str) -> Stage:
    """Return the stage of that number or name.

    Raises:
        ValueError: there is none; the nearest one is named.
    """
    for stage in table:
        if name in (stage.name, str(stage.number)):
            return stage
    near = nearest(name, [stage.name for stage in table])
    hint = f"did you mean {near!r}? " if near else ""
    raise ValueError(f"no stage {name!r}; {hint}stages: {' '.join(f'{s.number}={s.name}' for s in table)}")


def maker_of(table: Sequence[Stage], need: str) -> Stage | None:
    """Return the stage that makes ``need`` (a template), or a file inside it."""
    for stage in table:
        if any(made == need or made.startswith(need + "/") or need.startswith(made + "/") for made in stage.makes):
            return stage
    return None
