"""Frames of several utterances, split by utterance and put on a common scale for the held-out estimators.

F frames, D width, L layers, U utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.analysis.critics import GaussianScore, half_roots
from espnet_mamba.analysis.sampling import torch_generator
from espnet_mamba.analysis.whitening import fit_scaler


@dataclass(frozen=True)
class Part:
    """The frames of one split: x (F, Dx), y (L, F, Dy), utterance (F,) numbered 0..U-1.

    ``explained`` (L,) is the share of the variance that whitening kept, the lesser of x's and the layer's.
    """

    x: Tensor
    y: Tensor
    utterance: Tensor
    explained: tuple[float, ...] = ()

    @property
    def num_utts(self) -> int:
        """U."""
        return int(self.utterance.max()) + 1

    def sizes(self) -> np.ndarray:
        """Frames per utterance (U,)."""
        return torch.bincount(self.utterance, minlength=self.num_utts).double().numpy()


def split_by_utterance(
    x: Tensor,
    y: Tensor,
    utterance: Tensor,
    shares: tuple[float, float],
    most: tuple[int, int],
    seed: int,
    whitening: tuple[str, int | None] = ("standardise", None),
) -> tuple[Part, Part, Part]:
    """Split into train, select and held-out parts, put on a common scale by the training frames alone.

    x (F, Dx), y (L, F, Dy), utterance (F,) long numbers; ``shares`` are those of select and held-out, of which at most
    ``most`` evenly spaced frames are kept (all their pairs are scored); ``whitening`` is (kind, components), see
    whitening.py. ValueError when features are not finite or there are fewer than 6 utterances (each part needs two).
    """
    _require_finite("the reference", x)
    for layer, features in enumerate(y):
        _require_finite(f"layer {layer} (counted from 0 among those given)", features)
    numbers = torch.unique(utterance)
    count = len(numbers)
    num_select = max(2, round(shares[0] * count)) if shares[0] > 0 else 0
    num_held = max(2, round(shares[1] * count))
    if count - max(2, num_select) - num_held < 2:
        raise ValueError(f"mutual information: {count} utterances cannot be split in three parts of 2; give at least 6")
    shuffled = numbers[torch.randperm(count, generator=torch_generator("split", seed))]
    held, select, train = shuffled.split([num_held, num_select, count - num_held - num_select])
    in_train = torch.isin(utterance, train)
    scale_x = fit_scaler(x[in_train], *whitening)
    scale_y = [fit_scaler(layer[in_train], *whitening) for layer in y]
    parts = []
    for chosen in (train, select, held):
        mask = torch.isin(utterance, chosen)
        scaled = stack_layers([scale(layer[mask]) for layer, scale in zip(y, scale_y, strict=True)])
        ids = torch.unique(utterance[mask], return_inverse=True)[1]
        explained = tuple(min(scale.explained, scale_x.explained) for scale in scale_y)
        parts.append(Part(scale_x(x[mask]), scaled, ids, explained))
    return parts[0], _thin(parts[1], most[0]), _thin(parts[2], most[1])


@dataclass(frozen=True)
class Problem:
    """One split of data that gets a critic per estimator, seed and layer; ``name`` seeds its draws."""

    name: str
    train: Part
    select: Part
    held_out: Part
    gaussian: list[GaussianScore]  # per layer

    @classmethod
    def create(
        cls,
        name: str,
        x: Tensor,
        y: Tensor,
        utterance: Tensor,
        shares: tuple[float, float],
        most: tuple[int, int],
        whitening: tuple[str, int | None],
        seed: int,
    ) -> Problem:
        """Split and scale as :func:`split_by_utterance` does, and fit the Gaussian scores to the train part."""
        parts = split_by_utterance(x, y, utterance, shares, most, seed, whitening)
        # Few frames leave few components; all problems of a batch have the same width, whatever is in the batch.
        wide = [min(side.shape[-1], whitening[1] or side.shape[-1]) for side in (x, y)]
        train, select, held_out = (
            Part(_widen(part.x, wide[0]), _widen(part.y, wide[1]), part.utterance, part.explained) for part in parts
        )
        roots = half_roots(train.x, train.utterance)
        gaussian = [GaussianScore.fit(train.x, layer, train.utterance, roots) for layer in train.y]
        return cls(name, train, select, held_out, gaussian)


def _widen(features: Tensor, width: int) -> Tensor:
    return F.pad(features, (0, width - features.shape[-1]))


def blocks_of(num_frames: int, block_frames: int, guard_frames: int) -> tuple[Tensor, Tensor]:
    """Cut one utterance into blocks in time: the frames that are kept, and the block of each.

    ``guard_frames`` at both ends of every block are left out: the frames on the two sides of a border are nearly the
    same, and a critic that learned one would know the other. The incomplete last block is left out.
    """
    frames = torch.arange(num_frames // block_frames * block_frames)
    place = frames % block_frames
    keep = (place >= guard_frames) & (place < block_frames - guard_frames)
    return frames[keep], frames[keep] // block_frames


def stack_layers(layers: Sequence[Tensor]) -> Tensor:
    """Stack layers (F, D_l) of any widths to (L, F, D), narrower ones filled with zeros, which carry nothing."""
    width = max(layer.shape[1] for layer in layers)
    return torch.stack([F.pad(layer.float(), (0, width - layer.shape[1])) for layer in layers])


def _thin(part: Part, num_frames: int) -> Part:
    """Keep evenly spaced frames, at most ``num_frames``: all pairs of them are scored."""
    total = len(part.utterance)
    if total <= num_frames:
        return part
    keep = torch.linspace(0, total - 1, num_frames).round().long()
    ids = torch.unique(part.utterance[keep], return_inverse=True)[1]
    return Part(part.x[keep], part.y[:, keep], ids, part.explained)


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


def permuted_utterances(utterance: Tensor, generator: torch.Generator) -> Tensor:
    """Return a frame order (F,) as :func:`shuffled_null`, but with the utterances in a drawn circle.

    Utterances in order of their ids have neighbours of the same speaker; a drawn circle has not.
    """
    numbers, sizes = torch.unique_consecutive(utterance, return_counts=True)
    starts = torch.cumsum(sizes, 0) - sizes
    circle = torch.randperm(len(numbers), generator=generator)
    other = torch.empty_like(circle)
    other[circle] = circle.roll(-1)
    return torch.cat([starts[o] + torch.arange(int(n)) % sizes[o] for n, o in zip(sizes, other, strict=True)])


def _require_finite(what: str, features: Tensor) -> None:
    bad = ~torch.isfinite(features).all(dim=1)
    if bad.any():
        raise ValueError(
            f"{what}: {int(bad.sum())} of {len(bad)} frames are not finite; check the model that made them"
        )
