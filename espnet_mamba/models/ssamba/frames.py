"""SSAMBA's layers at 50 Hz, for what wants HuBERT's frames: alignments, k-means, a recogniser.

Letters: B utterances, S samples at 16 kHz, C columns of patches, T frames at 50 Hz, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet_mamba.models.ssamba.features import WINDOW
from espnet_mamba.models.ssamba.model import SsambaModel

HOP = 320  # samples from frame to frame


class SsambaFrames(nn.Module):
    """An ``SsambaModel`` with the frames of a HuBERT: a column's mean over its bands, repeated over its 160 ms.

    What changes faster than a column is not there: the repetition aligns, it does not add anything.
    """

    def __init__(self, model: SsambaModel) -> None:
        super().__init__()
        self.model = model
        column = model.config.downsample_rate
        if column % HOP:
            raise ValueError(f"{model.config.name}: a column of {column} samples cannot be cut into frames of {HOP}")
        self.repeats = column // HOP

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return ``depth / 2 + 1`` layers ``(B, T, D)`` and their lengths ``(B,)``, with T = (S - 400) // 320 + 1.

        Args:
            wavs: ``(B, S)``.
            num_samples: valid samples ``(B,)`` or None.
        """
        layers, num_columns = self.model.extract_features(wavs, num_samples, "mean")
        samples = torch.full_like(num_columns, wavs.shape[1]) if num_samples is None else num_samples
        # the last of these frames always lies in the last column: both counts leave out an end without a whole window
        num_frames = ((samples - WINDOW) // HOP + 1).clamp(min=0)
        total = int(num_frames.max())
        return [layer.repeat_interleave(self.repeats, dim=1)[:, :total] for layer in layers], num_frames
