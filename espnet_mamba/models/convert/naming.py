"""The same tensors under other names: a table of templates, read in either direction.

In a template ``{i}`` is a layer's number, ``{p}`` is weight or bias, ``{q}`` one of attention's four projections,
``{rest}`` any ending. A pair whose second side is None is left out on purpose; one whose second side begins with
``head.`` belongs to the pretraining head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Table = Sequence[tuple[str, str | None]]

PLACEHOLDERS = {"i": r"\d+", "p": "weight|bias", "q": "[qkv]|out", "rest": ".+"}
ORIGINAL0, ORIGINAL1 = "parametrizations.weight.original0", "parametrizations.weight.original1"


class Renamed(NamedTuple):
    """Tensors by this project's names."""

    tensors: dict[str, Tensor]  # of the encoder
    head: dict[str, Tensor]  # of the pretraining head: projection.weight, projection.bias, classes
    origin: dict[str, str]  # our name -> the name in the source
    dropped: list[str]  # names in the source that are left out on purpose


def rename(state: dict[str, Tensor], table: Table, source: str) -> Renamed:
    """Rename every tensor of ``state``.

    Raises:
        ValueError: a name that the table does not know (all are counted, the first are named), or no tensor behind it.
    """
    patterns = [(_pattern(theirs), ours) for theirs, ours in table]
    result = Renamed({}, {}, {}, [])
    unknown = []
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{source}: {name} is a {type(tensor).__name__}, not a tensor")
        match, ours = next(((m, ours) for pattern, ours in patterns if (m := pattern.fullmatch(name))), (None, None))
        if match is None:
            unknown.append(f"{name} {tuple(tensor.shape)}")
        elif ours is None:
            result.dropped.append(name)
        else:
            ours = ours.format(**match.groupdict())
            result.origin[ours] = name
            if ours.startswith("head."):
                result.head[ours.removeprefix("head.")] = tensor
            else:
                result.tensors[ours] = tensor
    if unknown:
        raise ValueError(f"{source}: no place in our model for {'; '.join(unknown[:8])} ({len(unknown)} in all)")
    return result


def rename_back(names: Sequence[str], table: Table) -> dict[str, str]:
    """Return their name of each of ours; of several that the table knows, the first.

    Raises:
        KeyError: a name that has no counterpart.
    """
    patterns = [(_pattern(ours), theirs) for theirs, ours in table if ours]
    found = {}
    for name in names:
        match, theirs = next(
            ((m, theirs) for pattern, theirs in patterns if (m := pattern.fullmatch(name))), (None, "")
        )
        if match is None:
            raise KeyError(name)
        found[name] = theirs.format(**match.groupdict())
    return found


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    groups = [f"(?P<{part}>{PLACEHOLDERS[part]})" if n % 2 else re.escape(part) for n, part in enumerate(parts)]
    return re.compile("".join(groups))
