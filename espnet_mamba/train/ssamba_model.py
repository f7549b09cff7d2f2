"""SSAMBA's pretraining model in the shape ESPnet's Task expects, and its batches."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.features import HOP, WINDOW
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining, SsambaLoss
from espnet_mamba.train.collate import Item


class ESPnetSsambaModel(AbsESPnetModel):
    """Wraps ``SsambaForPretraining``; the loss is InfoNCE per masked patch plus the weighted squared error."""

    def __init__(self, model: SsambaForPretraining) -> None:
        super().__init__()
        self.model = model

    @property
    def config(self) -> SsambaConfig:
        """The encoder's."""
        return self.model.encoder.config

    @property
    def feature_penalty_weight(self) -> float:
        """The weight of the loss's second part, under the name that the trainer reads."""
        return self.model.encoder.config.reconstruction_weight

    def sums(
        self, speech: Tensor, num_samples: Tensor | None = None, generator: torch.Generator | None = None
    ) -> SsambaLoss:
        """Return the batch's sums, from which an exact mean over processes can be made."""
        return self.model(speech, num_samples, generator)

    def loss(self, sums: SsambaLoss, num_masked: Tensor | None = None) -> Tensor:
        """Return the scalar loss; ``num_masked`` is the divisor, else the batch's count."""
        divisor = sums.num_masked if num_masked is None else num_masked
        return sums.info_nce_sum / divisor.clamp(min=1) + self.feature_penalty_weight * sums.mse

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return ESPnet's triple: loss, stats, weight."""
        sums = self.sums(**batch)
        loss, masked = self.loss(sums), sums.num_masked.clamp(min=1)
        stats = {
            "loss": loss.detach(),
            "loss_info_nce": (sums.info_nce_sum / masked).detach(),
            "loss_mse": sums.mse.detach(),
            "accuracy_masked": sums.correct_masked / masked,
        }
        return loss, stats, sums.num_masked

    def collect_feats(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return nothing: no feature statistics are needed, audio goes in raw."""
        return {}


@dataclass(frozen=True)
class SsambaCollate:
    """Make ``speech (B, S)`` and, in validation, ``num_samples (B,)``.

    In training every utterance is cropped to the shortest of its batch, to ``max_samples`` and to whole patches, so
    nothing is padded. The crop is a pure function of (seed, epoch, utterance id), as HuBERT's is.
    """

    seed: int
    train: bool
    frames_per_patch: int = 16
    max_samples: int = 164_080
    epoch: int = 0

    def __call__(self, items: Sequence[Item]) -> tuple[list[str], dict[str, Tensor]]:
        """Collate utterances."""
        utt_ids = [utt_id for utt_id, _ in items]
        wavs = [np.asarray(data["speech"], dtype=np.float32) for _, data in items]
        if self.train:
            return utt_ids, {"speech": torch.from_numpy(np.stack(self._crop(utt_ids, wavs)))}
        speech = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wav) for wav in wavs], batch_first=True)
        return utt_ids, {"speech": speech, "num_samples": torch.tensor([len(wav) for wav in wavs])}

    def _crop(self, utt_ids: list[str], wavs: list[np.ndarray]) -> list[np.ndarray]:
        length = whole_patches(min(self.max_samples, *(len(wav) for wav in wavs)), self.frames_per_patch)
        rows = []
        for utt_id, wav in zip(utt_ids, wavs, strict=True):
            generator = np.random.default_rng([self.seed, self.epoch, zlib.crc32(utt_id.encode())])
            first = int(generator.integers(0, len(wav) - length + 1))
            rows.append(wav[first : first + length])
        return rows


def whole_patches(num_samples: int, frames_per_patch: int) -> int:
    """Return the greatest length up to ``num_samples`` whose patches are all full; below one patch, that length."""
    frames = (num_samples - WINDOW) // HOP + 1
    if frames < frames_per_patch:
        return num_samples
    return (frames // frames_per_patch * frames_per_patch - 1) * HOP + WINDOW
