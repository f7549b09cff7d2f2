"""Praat's TextGrid, as forced aligners write it: interval tiers, long or short form, times in seconds."""

from __future__ import annotations

import re
from pathlib import Path

from espnet_mamba.data.kaldi import Segment

# Only quoted texts, numbers and <exists> carry meaning in either form; the long form's words between them do not.
_TOKEN = re.compile(r'"((?:[^"]|"")*)"|<exists>|(?<![\w\[.])(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)(?![\w\]])')


def read_textgrid(path: str | Path) -> dict[str, list[Segment]]:
    """Read a TextGrid's interval tiers: tier name -> segments in file order, empty texts included.

    Raises:
        ValueError: names the file and what is wrong with it (not UTF-8 or UTF-16, no tiers, cut, times that run back).
    """
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: neither UTF-8 nor UTF-16; save it again from Praat") from error
    tokens = [(m.group(1), m.group(2)) for m in _TOKEN.finditer(text) if m.group(1) is not None or m.group(2)]
    header = [quoted for quoted, _ in tokens[:2]]
    if header != ["ooTextFile", "TextGrid"]:
        raise ValueError(f"{path}: not a TextGrid; its first lines must say 'ooTextFile' and 'TextGrid'")
    try:
        return _tiers(str(path), tokens[5:], int(tokens[4][1] or ""))
    except (IndexError, TypeError) as error:
        raise ValueError(f"{path}: the TextGrid ends in the middle or a time is missing; align it again") from error


def _tiers(path: str, tokens: list[tuple[str | None, str | None]], num_tiers: int) -> dict[str, list[Segment]]:
    tiers: dict[str, list[Segment]] = {}
    position = 0
    for _ in range(num_tiers):
        kind, name = tokens[position][0], tokens[position + 1][0]
        count = int(tokens[position + 4][1])  # type: ignore[arg-type] # None is a TypeError, which the caller names
        position += 5
        width = 3 if kind == "IntervalTier" else 2  # a point has a time and a text
        rows = [tokens[position + width * i : position + width * (i + 1)] for i in range(count)]
        position += width * count
        if width == 3:
            segments = [Segment(float(row[0][1]), float(row[1][1]), _text(row[2][0])) for row in rows]  # type: ignore
            wrong = next((segment for segment in segments if segment.end < segment.start), None)
            if wrong:
                raise ValueError(f"{path}: {wrong.label!r} ends at {wrong.end:g} s, before its start {wrong.start:g} s")
            tiers[str(name)] = segments
    return tiers


def _text(quoted: str | None) -> str:
    if quoted is None:
        raise TypeError
    return quoted.replace('""', '"').strip()
