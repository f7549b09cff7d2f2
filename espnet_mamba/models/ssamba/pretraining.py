"""SSAMBA's objective: tell a masked patch from the utterance's other masked patches, and draw it again.

Letters: B utterances, S samples, G bands, C columns, M masked patches of the batch, D width, P values in a patch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.grid import PatchGrid
from espnet_mamba.models.ssamba.masking import mask_counts, square_mask
from espnet_mamba.models.ssamba.model import SsambaModel


class SsambaLoss(NamedTuple):
    """Sums over the batch, so that several processes can be averaged exactly.

    The properties are the names under which the trainer's meter reads any objective of this project.
    """

    info_nce_sum: Tensor  # summed over masked patches
    num_masked: Tensor
    mse: Tensor  # mean over masked patches and their values
    correct_masked: Tensor  # masked patches whose own target is the best candidate

    @property
    def loss_sum(self) -> Tensor:
        """The part that is a sum over masked patches."""
        return self.info_nce_sum

    @property
    def feature_penalty(self) -> Tensor:
        """The part that is a mean, and weighted."""
        return self.mse

    @property
    def correct_unmasked(self) -> Tensor:
        """Nothing is predicted at seen patches."""
        return torch.zeros_like(self.num_masked)

    @property
    def num_unmasked(self) -> Tensor:
        """Nothing is predicted at seen patches."""
        return torch.zeros_like(self.num_masked)


def info_nce(predictions: Tensor, targets: Tensor, masked_per_utterance: list[int]) -> tuple[Tensor, Tensor]:
    """Contrast each prediction with all masked patches of its own utterance.

    ``-log softmax_c(prediction . target_c)`` at the patch's own target: the softmax runs over the candidate targets of
    one prediction, not over the predictions that might claim one target, as it does in the published code.

    Args:
        predictions: ``(M, P)``, utterance after utterance.
        targets: ``(M, P)``, in the same order.
        masked_per_utterance: patches of each utterance; they add up to M.

    Returns:
        The loss summed over patches, and how many found their own target.
    """
    loss, correct = predictions.new_zeros(()), torch.zeros((), dtype=torch.long, device=predictions.device)
    parts = zip(predictions.split(masked_per_utterance), targets.split(masked_per_utterance), strict=True)
    for predicted, candidates in parts:
        logits = predicted @ candidates.T  # a row per prediction, a column per candidate
        own = torch.arange(len(logits), device=logits.device)
        loss = loss + F.cross_entropy(logits, own, reduction="sum")
        if len(logits):
            correct = correct + (logits.argmax(dim=1) == own).sum()
    return loss, correct


class SsambaForPretraining(nn.Module):
    """An SSAMBA model with its two heads, each ``Linear(D, D), ReLU, Linear(D, P)``."""

    def __init__(self, config: SsambaConfig) -> None:
        super().__init__()
        self.encoder = SsambaModel(config)
        self.classification_head = _head(config.embed_dim, config.patch_pixels)
        self.reconstruction_head = _head(config.embed_dim, config.patch_pixels)

    def forward(
        self, speech: Tensor, num_samples: Tensor | None = None, generator: torch.Generator | None = None
    ) -> SsambaLoss:
        """Mask, encode and score a batch: twice with masks of their own, or once if the config says so.

        Args:
            speech: audio ``(B, S)``.
            num_samples: valid samples ``(B,)``; None when nothing is padded.
            generator: source of the masks, on the device of ``speech``.
        """
        config = self.encoder.config
        features, grid = self.encoder.features(speech, num_samples)
        pixels = patch_pixels(features, config.patch_size)  # (B, G, C, P)
        counts = mask_counts(grid, config.mask_patches, config.num_patches)
        hidden, targets = self._masked(features, grid, pixels, counts, generator)
        nce, correct = self._contrast(hidden, targets, grid)
        if config.mask_passes == 2:
            hidden, targets = self._masked(features, grid, pixels, counts, generator)
        drawn = self.reconstruction_head(hidden).float()
        mse = (drawn - targets).square().sum() / max(1, targets.numel())
        return SsambaLoss(nce, counts.sum(), mse, correct)

    def _masked(
        self, features: Tensor, grid: PatchGrid, pixels: Tensor, counts: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Encode with a new mask; return masked tokens ``(M, D)`` and what they hide ``(M, P)``."""
        config = self.encoder.config
        mask = square_mask(grid, counts, config.mask_squares, generator)
        output = self.encoder.encode(features, grid, mask).output
        hidden = grid.to_grid(output[:, 1:])[mask]
        return self.encoder.final_norm(hidden) if config.final_norm == "twice" else hidden, pixels[mask]

    def _contrast(self, hidden: Tensor, targets: Tensor, grid: PatchGrid) -> tuple[Tensor, Tensor]:
        config = self.encoder.config
        # counted on the host, where the columns are known: a GPU is not asked and waited for
        counts = mask_counts(PatchGrid(grid.columns, grid.num_bands), config.mask_patches, config.num_patches)
        predictions = self.classification_head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return info_nce(predictions.float(), targets, counts.tolist())


def patch_pixels(features: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut spectrograms ``(B, mel bins, frames)`` into patches ``(B, G, C, P)``, mel bins first inside a patch."""
    bins, frames = patch_size
    cut = features.unflatten(2, (-1, frames)).unflatten(1, (-1, bins))  # (B, G, bins, C, frames)
    return cut.permute(0, 1, 3, 2, 4).flatten(3)


def _head(width: int, pixels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, pixels))
