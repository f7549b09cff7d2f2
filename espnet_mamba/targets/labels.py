"""Frame labels on disk: ``<set>.npy``, one uint16 array, and ``<set>.tsv``, where each utterance starts in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from espnet_mamba.data.files import atomic_path, write_text


class FrameLabels(Mapping[str, np.ndarray]):
    """Labels by utterance id; the array is mapped, not read, so a corpus of any size opens at once."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no frame labels; stage 3 (targets1) or 5 (targets2) makes them")
        self._values = np.load(self.path, mmap_mode="r")
        self._spans: dict[str, tuple[int, int]] = {}
        for line in self.path.with_suffix(".tsv").read_text(encoding="utf-8").splitlines():
            utt_id, start, count = line.split("\t")
            self._spans[utt_id] = (int(start), int(count))

    def __getitem__(self, utt_id: str) -> np.ndarray:
        if utt_id not in self._spans:
            raise KeyError(f"{self.path}: no labels for utterance {utt_id}; rerun the targets stage for this set")
        start, count = self._spans[utt_id]
        return np.asarray(self._values[start : start + count], dtype=np.int64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)


def write_labels(path: str | Path, labels: Mapping[str, np.ndarray]) -> None:
    """Write labels of a set, sorted by utterance id, to ``path`` (``.npy``) and its index beside it.

    Raises:
        ValueError: a label does not fit in 16 bits.
    """
    path = Path(path)
    start, rows, parts = 0, [], []
    for utt_id in sorted(labels):
        values = np.asarray(labels[utt_id])
        if values.size and (values.min() < 0 or values.max() > np.iinfo(np.uint16).max):
            raise ValueError(f"{utt_id}: label {values.max()} does not fit in 16 bits")
        rows.append(f"{utt_id}\t{start}\t{len(values)}\n")
        parts.append(values.astype(np.uint16))
        start += len(values)
    write_text(path.with_suffix(".tsv"), "".join(rows))
    with atomic_path(path) as temporary:
        np.save(temporary, np.concatenate(parts) if parts else np.zeros(0, np.uint16))
