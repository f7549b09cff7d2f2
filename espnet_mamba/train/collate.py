"""From loaded utterances to a batch: training crops or packs, validation pads or packs; audio and labels alike."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.data.errors import AudioError
from espnet_mamba.layers.packing import pack_waveforms

WINDOW, HOP = 400, 320  # samples of a front-end frame, and from frame to frame
Item = tuple[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class HubertCollate:
    """Make ``speech (B, S)``, ``labels (B, T)`` and, when something is padded, ``num_samples (B,)``.

    In training every utterance is cropped to the shortest of its batch (and to ``max_samples``), so nothing is padded.
    Packed, utterances keep their length (up to ``max_samples`` in training) and become one row: ``speech (1, S)``,
    ``labels (1, F)``, ``num_samples (B,)``. A crop is a pure function of (seed, epoch, utterance id): workers, ranks
    and a resumed run all draw the same.
    """

    label_rate: int  # labels per second, 100 (MFCC) or 50
    seed: int
    train: bool
    max_samples: int = 250_000
    epoch: int = 0
    packed: bool = False

    def __call__(self, items: Sequence[Item]) -> tuple[list[str], dict[str, Tensor]]:
        """Collate utterances.

        Raises:
            AudioError: an utterance whose labels do not fit its audio.
        """
        utt_ids = [utt_id for utt_id, _ in items]
        wavs = [np.asarray(data["speech"], dtype=np.float32) for _, data in items]
        labels = [frame_targets(u, len(w), d["labels"], self.label_rate) for (u, d), w in zip(items, wavs, strict=True)]
        if self.train:
            shortest = self.max_samples if self.packed else min(self.max_samples, *(len(wav) for wav in wavs))
            crops = [self._crop(u, w, t, shortest) for u, w, t in zip(utt_ids, wavs, labels, strict=True)]
            wavs, labels = [wav for wav, _ in crops], [target for _, target in crops]
        if self.packed:
            return utt_ids, _pack(wavs, labels)
        if self.train:
            return utt_ids, {"speech": torch.from_numpy(np.stack(wavs)), "labels": torch.from_numpy(np.stack(labels))}
        return utt_ids, _pad(wavs, labels)

    def check(self, item: Item) -> None:
        """Raise AudioError for an utterance whose labels do not fit its audio."""
        utt_id, data = item
        frame_targets(utt_id, len(data["speech"]), data["labels"], self.label_rate)

    def _crop(self, utt_id: str, wav: np.ndarray, target: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        if self.packed and len(wav) <= longest:
            return wav, target
        num_frames = (longest - WINDOW) // HOP + 1
        generator = np.random.default_rng([self.seed, self.epoch, zlib.crc32(utt_id.encode())])
        first = int(generator.integers(0, len(target) - num_frames + 1))
        samples = wav[first * HOP : first * HOP + (num_frames - 1) * HOP + WINDOW]
        return samples, target[first : first + num_frames]


def frame_targets(utt_id: str, num_samples: int, labels: np.ndarray, label_rate: int) -> np.ndarray:
    """Return one label per front-end frame.

    Raises:
        AudioError: the number of labels is not what ``num_samples`` and ``label_rate`` give.
    """
    if len(labels) != num_labels(num_samples, label_rate):
        expected = f"{num_samples} samples at {label_rate} labels per second have {num_labels(num_samples, label_rate)}"
        why = "the audio changed after labelling"
        value = f"{len(labels)} labels, but {expected}"
        raise AudioError(utt_id, "labels", value, why, "rerun the targets stage")
    return labels[:: label_rate // 50]


def num_labels(num_samples: Any, label_rate: int) -> Any:
    """Return how many labels a number of samples, or an array of them, has at 50 or 100 labels per second."""
    return (num_samples - WINDOW) // (16000 // label_rate) + 1


def _pack(wavs: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Tensor]:
    return {
        "speech": pack_waveforms([torch.from_numpy(wav) for wav in wavs], HOP),
        "labels": torch.from_numpy(np.concatenate(labels))[None],
        "num_samples": torch.tensor([len(wav) for wav in wavs]),
    }


def _pad(wavs: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Tensor]:
    batch = {
        "speech": torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wav) for wav in wavs], batch_first=True),
        "labels": torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in labels], batch_first=True),
        "num_samples": torch.tensor([len(wav) for wav in wavs]),
    }
    # a longer utterance's tail may give it one frame more than the padded batch's labels have, never less
    total = (batch["speech"].shape[1] - WINDOW) // HOP + 1
    batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, total - batch["labels"].shape[1]))
    return batch
