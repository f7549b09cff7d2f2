"""Frame labels on disk: ``<set>.npy``, one uint16 array, and ``<set>.tsv``, where each utterance starts in it.

A line is ``utterance start count``, lines are sorted by utterance and follow one another in the array.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from espnet_mamba.data.files import atomic_path, write_text

MAX_CLASSES = 2**16


class FrameLabels(Mapping[str, np.ndarray]):
    """Labels by utterance id.

    The array is mapped and the index kept as the lines it is, found by bisection and parsed when they are asked for, so
    that a million utterances open in a fraction of a second.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` (``.npy``) and the index beside it.

        Raises:
            FileNotFoundError: either is missing.
            ValueError: array and index are not of one writing.
        """
        self.path = Path(path)
        index = self.path.with_suffix(".tsv")
        for file in (self.path, index):
            if not file.is_file():
                raise FileNotFoundError(f"{file}: no frame labels; stage 3 (targets1) or 5 (targets2) makes them")
        self._values = np.load(self.path, mmap_mode="r")
        # A tab sorts before all that an id may hold, so that lines and ids are in the same order.
        self._lines = sorted(index.read_bytes().split(b"\n"))  # of what is sorted: one look at each
        self._lines = self._lines[bisect_left(self._lines, b"\x00") :]
        promised = sum(_span(self._lines[-1])) if self._lines else 0
        if promised != len(self._values):
            raise ValueError(
                f"{self.path}: {len(self._values)} labels, but {index.name} is of {promised}; they are not of one "
                "writing: delete both and rerun the targets stage"
            )

    def __getitem__(self, utt_id: str) -> np.ndarray:
        key = utt_id.encode() + b"\t"
        place = bisect_left(self._lines, key)
        if place == len(self._lines) or not self._lines[place].startswith(key):
            raise KeyError(f"{self.path}: no labels for utterance {utt_id}; rerun the targets stage for this set")
        start, count = _span(self._lines[place])
        return np.asarray(self._values[start : start + count], dtype=np.int64)

    def __contains__(self, utt_id: object) -> bool:
        key = str(utt_id).encode() + b"\t"
        place = bisect_left(self._lines, key)
        return place < len(self._lines) and self._lines[place].startswith(key)

    def __iter__(self) -> Iterator[str]:
        return (line[: line.index(b"\t")].decode() for line in self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def counts(self) -> np.ndarray:
        """Return the number of labels of each utterance, in the order of iteration."""
        return np.array([int(line[line.rindex(b"\t") :]) for line in self._lines], dtype=np.int64)


def _span(line: bytes) -> tuple[int, int]:
    _, start, count = line.split(b"\t")
    return int(start), int(count)


def without_labels(path: str | Path) -> dict[str, str]:
    """Return the utterances that the targets stage which wrote ``path`` could not use, and why, by its quality.json."""
    path = Path(path)
    quality = path.with_name("quality.json")
    if not quality.is_file():
        return {}
    return json.loads(quality.read_text(encoding="utf-8")).get("left_out", {}).get(path.stem, {})


def write_labels(path: str | Path, labels: Mapping[str, np.ndarray]) -> None:
    """Write labels of a set, sorted by utterance id, to ``path`` (``.npy``) and its index beside it.

    Raises:
        ValueError: a label does not fit in 16 bits.
    """
    ordered = {utt_id: np.asarray(labels[utt_id]) for utt_id in sorted(labels)}
    for utt_id, values in ordered.items():
        if values.size and (values.min() < 0 or values.max() >= MAX_CLASSES):
            raise ValueError(f"{utt_id}: label {values.max()} does not fit in 16 bits")
    stream_labels(path, {utt_id: len(values) for utt_id, values in ordered.items()}, ordered.values())


def stream_labels(path: str | Path, counts: Mapping[str, int], values: Iterable[np.ndarray]) -> None:
    """Write the ``values`` of utterances with ``counts`` labels each, both in order of id, one by one as uint16."""
    path = Path(path)
    rows, start = [], 0
    for utt_id, count in counts.items():
        rows.append(f"{utt_id}\t{start}\t{count}\n")
        start += count
    write_text(path.with_suffix(".tsv"), "".join(rows))
    with atomic_path(path) as temporary, temporary.open("wb") as handle:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<u2")), "fortran_order": False, "shape": (start,)}
        np.lib.format.write_array_header_1_0(handle, header)
        for part in values:
            handle.write(part.astype("<u2", copy=False).tobytes())
