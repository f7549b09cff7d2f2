"""Kaldi's text tables: ``wav.scp``, ``text``, ``utt2spk`` (one ``id value`` a line); phones.ctm and words.ctm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from espnet_mamba.data.files import write_text


class Segment(NamedTuple):
    """A labelled stretch of one utterance, in seconds from its first sample."""

    start: float
    end: float
    label: str


def _read_lines(path: str | Path) -> list[str]:
    """Return the lines of a UTF-8 file; FileNotFoundError or ValueError name the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such table")
    try:
        # Only \n ends a line here: str.splitlines would also cut at U+0085 and the like, which file names may hold.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it with iconv") from error
    return [line.rstrip("\r") for line in lines]


def scan_table(path: str | Path, allow_empty: bool = False) -> tuple[dict[str, str], list[str]]:
    """Read a table and return (id -> value in file order, problems); each problem is one line naming file and line.

    A repeated id keeps its first value. Without ``allow_empty`` an id with no value is a problem.
    """
    table: dict[str, str] = {}
    first_line: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        key, _, value = line.strip(" \t").replace("\t", " ", 1).partition(" ")
        value = value.strip()
        if key in table:
            problems.append(f"{path}:{number}: duplicate id {key!r}, first on line {first_line[key]}; keep one of them")
            continue
        if not value and not allow_empty:
            problems.append(f"{path}:{number}: id {key!r} has no value; add it or remove the line")
        table[key] = value
        first_line[key] = number
    return table, problems


def read_table(path: str | Path, allow_empty: bool = False) -> dict[str, str]:
    """Read ``id value`` lines into a dict in file order; ValueError lists every duplicate id and every empty value."""
    table, problems = scan_table(path, allow_empty)
    if problems:
        raise ValueError("; ".join(problems))
    return table


def write_table(path: str | Path, table: dict[str, str]) -> None:
    """Write ``id value`` lines atomically, in the dict's order."""
    write_text(path, "".join(f"{key} {value}".rstrip() + "\n" for key, value in table.items()))


def scan_ctm(path: str | Path) -> tuple[dict[str, list[Segment]], list[str]]:
    """Read ``utt channel start duration label`` lines; return (utterance -> segments in time order, problems)."""
    segments: dict[str, list[Segment]] = {}
    problems: list[str] = []
    for number, line in enumerate(_read_lines(path), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            utt_id, _, start, duration, label = fields[:5]
            begin, length = float(start), float(duration)
        except ValueError:
            problems.append(f"{path}:{number}: expected 'utt 1 start_seconds duration_seconds label', got {line!r}")
            continue
        if not (math.isfinite(begin) and math.isfinite(length) and begin >= 0 and length >= 0):
            problems.append(f"{path}:{number}: {utt_id}: start {start} and duration {duration} must be 0 s or more")
            continue
        segments.setdefault(utt_id, []).append(Segment(begin, begin + length, label))
    for rows in segments.values():
        rows.sort(key=lambda segment: segment.start)
    return segments, problems


def read_ctm(path: str | Path) -> dict[str, list[Segment]]:
    """Read a CTM file into utterance -> segments in time order; ValueError lists every malformed line."""
    segments, problems = scan_ctm(path)
    if problems:
        raise ValueError("; ".join(problems))
    return segments


def write_ctm(path: str | Path, segments: dict[str, list[Segment]]) -> None:
    """Write ``utt 1 start duration label`` lines atomically, times in seconds to four decimals (0.1 ms)."""
    # The duration is the difference of the rounded ends: then neighbours meet exactly and rounding does not add up.
    write_text(
        path,
        "".join(
            f"{utt_id} 1 {round(s.start, 4):.4f} {round(s.end, 4) - round(s.start, 4):.4f} {s.label}\n"
            for utt_id, rows in segments.items()
            for s in rows
        ),
    )
