"""``wav.scp`` opened as ESPnet opens its data: utterance -> samples, from files and tar shards alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from espnet_mamba.data.audio import read_audio
from espnet_mamba.data.compact_table import CompactTable

# For espnet2.train.dataset.DATA_TYPES: takes the place of ESPnet's own ``sound``, which knows files only.
SOUND_HELP = (
    "Audio of 16 kHz, mono, from files or from tar shards, read by byte offset without unpacking."
    "\n\n   utterance_id_a a.flac\n   utterance_id_b shard.tar:512:31415\n   ..."
)


class AudioList(Mapping[str, np.ndarray]):
    """Recordings by utterance id; float32 (S,) at 16 kHz. AudioError names one that cannot be used."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path).parent
        self.locations = CompactTable(path)

    def __getitem__(self, utt_id: str) -> np.ndarray:
        return read_audio(self.locations[utt_id])

    def __contains__(self, utt_id: object) -> bool:
        return utt_id in self.locations

    def __iter__(self) -> Iterator[str]:
        return iter(self.locations)

    def __len__(self) -> int:
        return len(self.locations)
