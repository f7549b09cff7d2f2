"""Frames of several utterances, split by utterance and standardised for the held-out estimators.

F frames, D width, L layers, U utterances.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.analysis.sampling import torch_generator

_ZERO_SPREAD = 1e-6


@dataclass(frozen=True)
class Part:
    """The frames of one split: x (F, Dx), y (L, F, Dy), utterance (F,) numbered 0..U-1."""

    x: Tensor
    y: Tensor
    utterance: Tensor

    @property
    def num_utts(self) -> int:
        """U."""
        return int(self.utterance.max()) + 1

    def sizes(self) -> np.ndarray:
        """Frames per utterance (U,)."""
        return torch.bincount(self.utterance, minlength=self.num_utts).double().numpy()

    def different(self) -> Tensor:
        """Which pairs of frames are of different utterances: (1, F, F) bool."""
        return (self.utterance[:, None] != self.utterance[None, :])[None]


def split_by_utterance(
    x: Tensor, y: Tensor, utterance: Tensor, shares: tuple[float, float], most: tuple[int, int], seed: int
) -> tuple[Part, Part, Part]:
    """Split into train, select and held-out parts, standardised by the training frames' mean and deviation.

    x (F, Dx), y (L, F, Dy), utterance (F,) long numbers; ``shares`` are those of select and held-out, of which at most
    ``most`` evenly spaced frames are kept (all their pairs are scored).
    ValueError when features are not finite or there are fewer than 6 utterances (each part needs two).
    """
    _require_finite("the reference", x)
    for layer, features in enumerate(y):
        _require_finite(f"layer {layer} (counted from 0 among those given)", features)
    numbers = torch.unique(utterance)
    count = len(numbers)
    num_select = max(2, round(shares[0] * count))
    num_held = max(2, round(shares[1] * count))
    if count - num_select - num_held < 2:
        raise ValueError(f"mutual information: {count} utterances cannot be split in three parts of 2; give at least 6")
    shuffled = numbers[torch.randperm(count, generator=torch_generator("split", seed))]
    held, select, train = shuffled.split([num_held, num_select, count - num_held - num_select])
    in_train = torch.isin(utterance, train)
    moments_x = _moments(x[in_train])
    moments = [_moments(layer[in_train]) for layer in y]
    parts = []
    for chosen in (train, select, held):
        mask = torch.isin(utterance, chosen)
        scaled = torch.stack([_scale(layer[mask], moment) for layer, moment in zip(y, moments, strict=True)])
        ids = torch.unique(utterance[mask], return_inverse=True)[1]
        parts.append(Part(_scale(x[mask], moments_x), scaled, ids))
    return parts[0], _thin(parts[1], most[0]), _thin(parts[2], most[1])


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per dimension; a constant dimension gets an infinite spread, so it becomes 0."""
    spread, mean = torch.std_mean(features.double(), dim=0)
    constant = spread <= _ZERO_SPREAD * mean.abs().clamp(min=_ZERO_SPREAD)
    return mean.float(), torch.where(constant, torch.inf, spread).float()


def _scale(features: Tensor, moments: tuple[Tensor, Tensor]) -> Tensor:
    return (features.float() - moments[0]) / moments[1]


def _thin(part: Part, num_frames: int) -> Part:
    """Keep evenly spaced frames, at most ``num_frames``: all pairs of them are scored."""
    total = len(part.utterance)
    if total <= num_frames:
        return part
    keep = torch.linspace(0, total - 1, num_frames).round().long()
    return Part(part.x[keep], part.y[:, keep], torch.unique(part.utterance[keep], return_inverse=True)[1])


def shuffled_null(utterance: Tensor) -> Tensor:
    """Return the frame order (F,) that pairs every frame with one of another utterance, in time order.

    Each utterance's place is taken by the frames of the next one (repeated or cut to its length). What two utterances
    share stays: that neighbouring frames change slowly, and that both begin and end in silence. On read speech this
    alone is worth 0.1 to 0.2 nats, which a null of freely shuffled frames would not show.
    """
    numbers, sizes = torch.unique_consecutive(utterance, return_counts=True)
    starts = torch.cumsum(sizes, 0) - sizes
    order = []
    for index in range(len(numbers)):
        other = (index + 1) % len(numbers)
        order.append(starts[other] + torch.arange(int(sizes[index])) % sizes[other])
    return torch.cat(order)


def _require_finite(what: str, features: Tensor) -> None:
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{what}: {int(bad.sum())} of {len(bad)} frames are not finite; check the model that made them"
        )
