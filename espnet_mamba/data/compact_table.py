"""Kaldi tables of a million lines, read in a second and held in a few arrays.

A dict of a million entries is two million objects, and each process that reads audio ends up with a copy of them:
looking at a Python object writes its reference count, which copies the memory page that a fork shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

NEWLINE, SPACE, TAB = 10, 32, 9


class Lines(NamedTuple):
    """Where the ids and values of N lines lie in ``text``: ``[start, gap)`` and ``(gap, end)``, each (N,)."""

    text: bytes
    start: np.ndarray
    gap: np.ndarray
    end: np.ndarray

    def ids(self) -> np.ndarray:
        """Return the ids (N,), as bytes."""
        return np.array([self.text[a:b] for a, b in zip(self.start.tolist(), self.gap.tolist(), strict=True)], "S")

    def value(self, index: int) -> str:
        """Return the value of a line."""
        return self.text[self.gap[index] + 1 : self.end[index]].decode().strip()


class CompactTable(Mapping[str, str]):
    """``id value`` lines of a file, by id, in the file's order."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.lines = Path(path), read_lines(path)
        self.ids = self.lines.ids()
        # by id, for a binary search; None where the file is sorted already
        self._order = None if (self.ids[:-1] < self.ids[1:]).all() else np.argsort(self.ids, kind="stable")
        self._sorted = self.ids if self._order is None else self.ids[self._order]
        twice = np.flatnonzero(self._sorted[:-1] == self._sorted[1:])
        if len(twice):
            raise ValueError(
                f"{path}: id {self._sorted[twice[0]].decode()!r} stands there twice; keep one of the lines"
            )

    def index(self, utt_id: str) -> int:
        """Return the line of an id, counted from 0; KeyError where there is none."""
        key = utt_id.encode()
        if len(key) <= self._sorted.itemsize:  # else NumPy would widen the whole array to compare
            place = int(np.searchsorted(self._sorted, np.array(key, self._sorted.dtype)))
            if place < len(self._sorted) and self._sorted[place] == key:
                return place if self._order is None else int(self._order[place])
        raise KeyError(f"{self.path}: no line for {utt_id}")

    def indices(self, ids: np.ndarray) -> np.ndarray:
        """Return the lines (N,) of ids (N,) given as bytes, -1 where there is none."""
        place = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        line = place if self._order is None else self._order[place]
        return np.where(self._sorted[place] == ids, line, -1)

    def __getitem__(self, utt_id: str) -> str:
        return self.lines.value(self.index(utt_id))

    def __contains__(self, utt_id: object) -> bool:
        try:
            return self.index(str(utt_id)) >= 0
        except KeyError:
            return False

    def __iter__(self) -> Iterator[str]:
        return (utt_id.decode() for utt_id in self.ids)

    def __len__(self) -> int:
        return len(self.ids)


def read_lines(path: str | Path) -> Lines:
    """Find the ids and values of a table; empty lines are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line in it, or not UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such table")
    text = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    lines = _split(text)
    if (lines.gap == lines.start).any():  # a line begins with a space, or is nothing else
        lines = _split(b"\n".join(line.strip() for line in text.split(b"\n")))
    if not len(lines.start):
        raise ValueError(f"{path}: no line in it; rerun the stage that makes it")
    try:
        lines.text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it with iconv") from error
    return lines


def _split(text: bytes) -> Lines:
    values = np.frombuffer(text, np.uint8)
    ends = np.append(np.flatnonzero(values == NEWLINE), len(values))
    starts = np.append(0, ends[:-1] + 1)
    starts, ends = starts[ends > starts], ends[ends > starts]
    spaces = np.append(np.flatnonzero((values == SPACE) | (values == TAB)), len(values))
    gaps = np.minimum(spaces[np.searchsorted(spaces, starts)], ends)
    return Lines(text, starts, gaps, ends)


def read_lengths(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read ``utterance samples[,...]`` lines: ids as bytes and numbers of samples, each (N,).

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line in it, or one without a whole number above 0; it is named.
    """
    lines = read_lines(path)
    ids, text = lines.ids(), lines.text
    values = [text[a + 1 : b] for a, b in zip(lines.gap.tolist(), lines.end.tolist(), strict=True)]
    if b"," in text:
        values = [value.partition(b",")[0] for value in values]
    try:
        lengths = np.array(values, "S").astype(np.int64)
    except ValueError:
        lengths = np.array([int(value) if value.strip().isdigit() else 0 for value in values])
    if lengths.min() < 1:
        bad = int(np.argmin(lengths))
        raise ValueError(
            f"{path}: {ids[bad].decode()}: {values[bad].decode()!r} is not a number of samples; rerun stage 2 (check)"
        )
    return ids, lengths
