"""From loaded utterances to a batch: training crops, validation pads. Audio and labels are cut at the same frames."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WINDOW, HOP = 400, 320  # samples of a front-end frame, and from frame to frame
Item = tuple[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class HubertCollate:
    """Make ``speech (B, S)``, ``labels (B, T)`` and, when something is padded, ``num_samples (B,)``.

    In training every utterance is cropped to the shortest of its batch (and to ``max_samples``), so nothing is padded.
    The crop is a pure function of (seed, epoch, utterance id): workers, ranks and a resumed run all draw the same.
    """

    label_rate: int  # labels per second, 100 (MFCC) or 50
    seed: int
    train: bool
    max_samples: int = 250_000
    epoch: int = 0

    def __call__(self, items: Sequence[Item]) -> tuple[list[str], dict[str, Tensor]]:
        """Collate utterances.

        Raises:
            ValueError: an utterance whose labels do not fit its audio.
        """
        utt_ids = [utt_id for utt_id, _ in items]
        wavs = [np.asarray(data["speech"], dtype=np.float32) for _, data in items]
        labels = [frame_targets(u, len(w), d["labels"], self.label_rate) for (u, d), w in zip(items, wavs, strict=True)]
        return utt_ids, self._crop(utt_ids, wavs, labels) if self.train else _pad(wavs, labels)

    def _crop(self, utt_ids: list[str], wavs: list[np.ndarray], labels: list[np.ndarray]) -> dict[str, Tensor]:
        shortest = min(self.max_samples, *(len(wav) for wav in wavs))
        num_frames = (shortest - WINDOW) // HOP + 1
        rows, targets = [], []
        for utt_id, wav, target in zip(utt_ids, wavs, labels, strict=True):
            generator = np.random.default_rng([self.seed, self.epoch, zlib.crc32(utt_id.encode())])
            first = int(generator.integers(0, len(target) - num_frames + 1))
            rows.append(wav[first * HOP : first * HOP + (num_frames - 1) * HOP + WINDOW])
            targets.append(target[first : first + num_frames])
        return {"speech": torch.from_numpy(np.stack(rows)), "labels": torch.from_numpy(np.stack(targets))}


def frame_targets(utt_id: str, num_samples: int, labels: np.ndarray, label_rate: int) -> np.ndarray:
    """Return one label per front-end frame.

    Raises:
        ValueError: the number of labels is not what ``num_samples`` and ``label_rate`` give.
    """
    step = 100 // label_rate  # label hops of 10 ms
    expected = (num_samples - WINDOW) // (160 * step) + 1
    if len(labels) != expected:
        raise ValueError(
            f"{utt_id}: {len(labels)} labels, but {num_samples} samples at {label_rate} labels per second "
            f"have {expected}; the audio changed after labelling: rerun the targets stage"
        )
    return labels[:: 2 // step]


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
