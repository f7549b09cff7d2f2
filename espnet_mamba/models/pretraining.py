"""The HuBERT objective: masked prediction of cluster labels, plus a penalty on the front end (docs/papers.md 1, 5).

Letters: B utterances, S samples, T frames at 50 Hz, D width, K classes, M masked frames.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.conv_frontend import num_conv_frames
from espnet_mamba.layers.packing import Packing
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel, HubertOutput
from espnet_mamba.models.masking import span_mask

HEAD_DIM = 256
TEMPERATURE = 0.1
UNMASKED_AT_ONCE = 4096  # frames that are only watched and scored together, so that no (B * T, K) tensor arises


class CosineHead(nn.Module):
    """Logits by cosine similarity: ``cos(W h, e_k) / 0.1`` for learned class embeddings ``e_k``."""

    def __init__(self, embed_dim: int, num_classes: int, head_dim: int = HEAD_DIM) -> None:
        super().__init__()
        self.projection = nn.Linear(embed_dim, head_dim)
        self.classes = nn.Parameter(torch.rand(num_classes, head_dim))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``(M, D)`` to logits ``(M, K)``, in float32."""
        queries = F.normalize(self.projection(hidden).float(), dim=-1)
        return queries @ F.normalize(self.classes.float(), dim=-1).T / TEMPERATURE


class PretrainingLoss(NamedTuple):
    """Sums over the batch, so that several processes can be averaged exactly."""

    loss_sum: Tensor  # cross-entropy summed over masked frames
    num_masked: Tensor
    feature_penalty: Tensor  # mean squared output of the front end
    correct_masked: Tensor
    correct_unmasked: Tensor
    num_unmasked: Tensor


class HubertForPretraining(nn.Module):
    """A HuBERT model with its prediction head."""

    def __init__(
        self, config: HubertConfig, num_classes: int, mask_probability: float = 0.8, mask_span: int = 10
    ) -> None:
        super().__init__()
        self.hubert = HubertModel(config)
        self.head = CosineHead(config.embed_dim, num_classes)
        self.num_classes = num_classes
        self.mask_probability, self.mask_span = mask_probability, mask_span

    def forward(
        self,
        speech: Tensor,
        labels: Tensor,
        num_samples: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PretrainingLoss:
        """Mask, encode, and score a batch.

        Args:
            speech: audio ``(B, S)``, or a packed row ``(1, S)`` of B utterances.
            labels: one class per frame ``(B, T)``; what stands in the padding is not read. Packed, ``(1, F)``.
            num_samples: valid samples ``(B,)``, best on the CPU (see ``HubertModel.forward``); None when nothing is
                padded.
            generator: source of the masks, on the device of ``speech``.

        Raises:
            ValueError: labels and frames differ in number.
        """
        total = int(num_conv_frames(speech.shape[1], self.hubert.config.conv_layers))
        if num_samples is not None and _is_packed(speech, labels, num_samples, total):
            return self._forward_packed(speech, labels, num_samples, generator)
        if labels.shape[1] != total:
            raise ValueError(f"labels have {labels.shape[1]} frames, the audio has {total}")
        if num_samples is None:
            valid_samples = torch.full((len(speech),), speech.shape[1], device=speech.device)
        else:
            valid_samples = num_samples.to(speech.device, non_blocking=True)
        num_frames = num_conv_frames(valid_samples, self.hubert.config.conv_layers)
        mask = span_mask(num_frames, total, self.mask_probability, self.mask_span, generator=generator)
        output = self.hubert(speech, num_samples, mask)
        valid = torch.arange(total, device=speech.device) < num_frames[:, None]
        return self._score(output, labels, mask, valid)

    def _forward_packed(
        self, row: Tensor, labels: Tensor, num_samples: Tensor, generator: torch.Generator | None
    ) -> PretrainingLoss:
        num_samples = num_samples.cpu()
        frames = num_conv_frames(num_samples, self.hubert.config.conv_layers).clamp(min=0)
        packing = Packing(frames, row.device)
        if labels.shape[1] != packing.num_frames:
            raise ValueError(f"labels have {labels.shape[1]} frames, the packed audio has {packing.num_frames}")
        masking = (self.mask_probability, self.mask_span)
        mask = packing.pack(span_mask(packing.lengths, packing.longest, *masking, generator=generator))
        output = self.hubert(row, num_samples, mask, packed=True)
        return self._score(output, labels, mask, torch.ones_like(mask))

    def _score(self, output: HubertOutput, labels: Tensor, mask: Tensor, valid: Tensor) -> PretrainingLoss:
        hidden, labels = output.hidden_states[-1].flatten(0, 1), labels.flatten()
        masked, seen = _masked_and_seen(mask, valid)
        targets = labels[masked]
        logits = self.head(hidden.index_select(0, masked))
        loss_sum = F.cross_entropy(logits, targets, reduction="sum")
        with torch.no_grad():  # only watched
            correct_masked = (logits.argmax(-1) == targets).sum()
            correct_unmasked = torch.zeros_like(correct_masked)
            for part in seen.split(UNMASKED_AT_ONCE):
                correct_unmasked += (self.head(hidden[part]).argmax(-1) == labels[part]).sum()
        penalty = (output.conv_features.float().square().mean(-1) * valid).sum() / valid.sum()
        return PretrainingLoss(loss_sum, mask.sum(), penalty, correct_masked, correct_unmasked, (valid & ~mask).sum())


def _is_packed(speech: Tensor, labels: Tensor, num_samples: Tensor, total: int) -> bool:
    """Whether ``speech`` is a packed row; one of a single utterance may have a frame in its slot's end beyond it."""
    return len(num_samples) != len(speech) or len(speech) == 1 and labels.shape[1] != total


def _masked_and_seen(mask: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the places of masked frames and of the other valid ones in ``(B * T,)``, both in order.

    Their numbers shape everything behind, so the host must know them: the one time that it waits for a GPU.
    """
    seen = valid & ~mask
    order = torch.where(mask, 0, torch.where(seen, 1, 2)).flatten().argsort(stable=True)
    num_masked, num_seen = torch.stack([mask.sum(), seen.sum()]).tolist()
    return order[:num_masked], order[num_masked : num_masked + num_seen]
