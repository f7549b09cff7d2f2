"""The pretraining model in the shape ESPnet's Task expects."""

from __future__ import annotations

import torch
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch import Tensor

from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.pretraining import HubertForPretraining, PretrainingLoss


class ESPnetHubertModel(AbsESPnetModel):
    """Wraps ``HubertForPretraining``; the loss is the mean over masked frames plus the weighted feature penalty."""

    def __init__(self, model: HubertForPretraining, feature_penalty_weight: float = 10.0) -> None:
        super().__init__()
        self.model = model
        self.feature_penalty_weight = feature_penalty_weight

    @property
    def config(self) -> HubertConfig:
        """The encoder's."""
        return self.model.hubert.config

    def sums(
        self,
        speech: Tensor,
        labels: Tensor,
        num_samples: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> PretrainingLoss:
        """Return the batch's sums, from which an exact mean over processes can be made."""
        return self.model(speech, labels, num_samples, generator)

    def loss(self, sums: PretrainingLoss, num_masked: Tensor | None = None) -> Tensor:
        """Return the scalar loss (docs/papers.md 5); ``num_masked`` is the divisor, else the batch's count."""
        divisor = sums.num_masked if num_masked is None else num_masked
        return sums.loss_sum / divisor.clamp(min=1) + self.feature_penalty_weight * sums.feature_penalty

    def forward(self, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return ESPnet's triple: loss, stats, weight."""
        sums = self.sums(**batch)
        loss = self.loss(sums)
        stats = {
            "loss": loss.detach(),
            "loss_masked": (sums.loss_sum / sums.num_masked.clamp(min=1)).detach(),
            "feature_penalty": sums.feature_penalty.detach(),
            "accuracy_masked": sums.correct_masked / sums.num_masked.clamp(min=1),
            "accuracy_unmasked": sums.correct_unmasked / sums.num_unmasked.clamp(min=1),
        }
        return loss, stats, sums.num_masked

    def collect_feats(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return nothing: no feature statistics are needed, audio goes in raw."""
        return {}
