"""The checked list of utterances that stage 2 writes and every later stage reads. S: samples at 16 kHz."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from espnet_mamba.data.kaldi import read_table


@dataclass(frozen=True)
class Utterance:
    """One checked recording: 16 kHz mono, ``num_samples`` long; ``text`` is empty when the set has none."""

    utt_id: str
    path: str
    num_samples: int
    speaker: str
    text: str


def read_manifest(folder: str | Path) -> list[Utterance]:
    """Read a ``dump/raw/<set>`` folder into utterances sorted by id.

    FileNotFoundError names the stage that makes the folder; ValueError names ids that are not in all tables.
    """
    folder = Path(folder)
    if not (folder / "utt2num_samples").is_file():
        raise FileNotFoundError(f"{folder}/utt2num_samples: not there; it is made by stage 2 (check)")
    paths = read_table(folder / "wav.scp")
    lengths = read_table(folder / "utt2num_samples")
    speakers = read_table(folder / "utt2spk")
    texts = read_table(folder / "text", allow_empty=True) if (folder / "text").is_file() else dict.fromkeys(paths, "")
    for name, table in (("utt2num_samples", lengths), ("utt2spk", speakers), ("text", texts)):
        odd = sorted(set(paths) ^ set(table))
        if odd:
            raise ValueError(
                f"{folder}/{name}: {len(odd)} ids differ from wav.scp, the first is {odd[0]!r}; rerun stage 2 (check)"
            )
    return [
        Utterance(utt_id, path, _whole_number(folder, utt_id, lengths[utt_id]), speakers[utt_id], texts[utt_id])
        for utt_id, path in sorted(paths.items())
    ]


def _whole_number(folder: Path, utt_id: str, value: str) -> int:
    """Return ``value`` as a positive whole number or name the utterance."""
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{folder}/utt2num_samples: {utt_id}: {value!r} is not a count; rerun stage 2 (check)")
    return int(value)
