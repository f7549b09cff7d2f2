"""What the jobs of a targets stage leave for the next step: a file of results and, written after it, a JSON file with
the digest of all that the results hang on, the utterances in order, and those that could not be used.

T frames of an utterance, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from espnet_mamba.data.files import atomic_path, read_json, write_json
from espnet_mamba.targets.labels import stream_labels


def is_done(path: Path, digest: str) -> bool:
    """Whether the part whose JSON file is ``path`` was finished from the same inputs and options."""
    return path.is_file() and read_json(path).get("digest") == digest


def _read(path: Path, digest: str) -> dict[str, Any]:
    if not is_done(path, digest):
        why = "is of other inputs or options" if path.is_file() else "is not there"
        raise FileNotFoundError(f"{path}: this shard {why}; run the stage again: what is finished is kept")
    return read_json(path)


def save_frames(path: Path, digest: str, frames: Mapping[str, Tensor], bad: Mapping[str, str]) -> None:
    """Write a shard of the sample: utterance -> ``(T, D)``, and utterance -> why it could not be used."""
    joined = torch.cat(list(frames.values())) if frames else torch.zeros(0, 1)
    with atomic_path(path.with_suffix(".safetensors")) as temporary:
        save_file({"frames": joined}, temporary)
    sizes = {utt_id: len(rows) for utt_id, rows in frames.items()}
    write_json(path, {"digest": digest, "sizes": sizes, "bad": bad})


def open_frames(paths: Sequence[Path], digest: str) -> tuple[dict[str, int], Callable[[str], Tensor], dict[str, str]]:
    """Return T of each utterance over all shards, what reads its frames ``(T, D)``, and the bad ones.

    Raises:
        FileNotFoundError: a shard is missing or of other inputs.
    """
    places: dict[str, tuple[Any, int, int]] = {}
    bad: dict[str, str] = {}
    for path in paths:
        found = _read(path, digest)
        stored, start = safe_open(path.with_suffix(".safetensors"), "pt").get_slice("frames"), 0
        for utt_id, size in found["sizes"].items():
            places[utt_id] = (stored, start, start + size)
            start += size
        bad |= found["bad"]

    def read(utt_id: str) -> Tensor:
        stored, start, end = places[utt_id]
        return stored[start:end]

    return {utt_id: end - start for utt_id, (_, start, end) in places.items()}, read, bad


def save_labels(path: Path, digest: str, labels: Mapping[str, np.ndarray], bad: Mapping[str, str], hop: int) -> None:
    """Write a shard's uint16 labels, utterance -> ``(T,)``, of frames that are ``hop`` samples apart."""
    with atomic_path(path.with_suffix(".npy")) as temporary:
        np.save(temporary, np.concatenate(list(labels.values())) if labels else np.zeros(0, np.uint16))
    sizes = {utt_id: len(values) for utt_id, values in labels.items()}
    write_json(path, {"digest": digest, "sizes": sizes, "bad": bad, "hop": hop})


def merge_labels(paths: Sequence[Path], digest: str, merged: Path) -> tuple[dict[str, str], int]:
    """Write the labels of all shards to ``merged``, sorted by utterance; return the bad utterances and the hop.

    Raises:
        FileNotFoundError: a shard is missing or of other inputs.
        ValueError: a shard's files are not of one writing.
    """
    places: dict[str, tuple[np.ndarray, int, int]] = {}
    bad: dict[str, str] = {}
    hop = 0
    for path in paths:
        found = _read(path, digest)
        values, start = np.load(path.with_suffix(".npy"), mmap_mode="r"), 0
        for utt_id, size in found["sizes"].items():
            places[utt_id] = (values, start, start + size)
            start += size
        if start != len(values):
            raise ValueError(f"{path}: of {start} labels, beside {len(values)}; delete it and run the stage again")
        bad |= found["bad"]
        hop = found["hop"]
    ordered = {utt_id: places[utt_id] for utt_id in sorted(places)}
    sizes = {utt_id: end - start for utt_id, (_, start, end) in ordered.items()}
    stream_labels(merged, sizes, (values[start:end] for values, start, end in ordered.values()))
    return bad, hop
