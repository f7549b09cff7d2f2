"""Mutual information by nearest neighbours (KSG, first estimator: Kraskov, Stoegbauer and Grassberger 2004).

Nothing is trained but the rotation to a few principal components, on the training utterances; the value is taken on the
held-out ones. Neighbours are looked for among frames of other utterances only: a frame's neighbours in time are nearly
itself and would pass for dependence. What is estimated is the information between the components kept.

The bias is stated: for each layer Gaussian frames with the very correlations found, as many and of the same utterances,
go through the same estimator, and their closed form is known (what is not linear in the layer has no twin). Neighbours
are far away in many dimensions, and strong dependence then looks weak: with 4 + 4 components 2 nats lose a tenth.
Neighbours of one other utterance in a row count as several, which lowers the value too.
F frames, K components, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import digamma
from scipy.stats import t as student_t
from torch import Tensor

from espnet_mamba.analysis.bounds import at_ceiling
from espnet_mamba.analysis.critics import GaussianScore
from espnet_mamba.analysis.sampling import torch_generator
from espnet_mamba.analysis.splits import Part, shuffled_null, split_by_utterance, stack_layers
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue

_PAIRS_AT_ONCE = 4_000_000  # per block of rows: what is kept in memory at once


@dataclass(frozen=True)
class KsgSettings:
    """Components and neighbours are numbers, shares are of the utterances."""

    components: int = 4
    neighbours: int = 3
    train_share: float = 0.5  # utterances that give the components; the rest gives the value
    held_out_frames: int = 4000
    groups: int = 8  # of held-out utterances, whose values' spread gives the interval


@dataclass(frozen=True)
class KsgValue:
    """One layer's value in nats; ``bias`` is what the estimator adds to Gaussian frames of the same correlations.

    The interval holds both the spread over utterances (95 %) and the bias, added as squares.
    """

    value: float
    low: float
    high: float
    ceiling: float
    bias: float
    num_frames: int
    num_utts: int
    explained: float = 1.0

    @property
    def flag(self) -> str:
        """Why the value may be far off: ``ceiling``, ``components``, ``bias``, or empty.

        ``components``: they hold less than 90 % of the variance of a side, and what the rest knows is not in the value.
        ``bias``: it is more than a tenth of the value and than 0.05 nats.
        """
        if at_ceiling(self.value, self.ceiling):
            return "ceiling"
        if self.explained < 0.9:
            return "components"
        return "bias" if abs(self.bias) > max(0.05, 0.1 * abs(self.value)) else ""


def ksg(x: Tensor, y: Tensor, utterance: Tensor, neighbours: int) -> np.ndarray:
    """Return every frame's term (L, F), whose mean over frames is the estimate in nats.

    x (F, Kx), y (L, F, Ky), utterance (F,): frames of the same number are no neighbours of each other. Distances are
    the largest difference of any component. ValueError when a frame has no ``neighbours`` in other utterances.
    """
    sizes = torch.bincount(utterance)
    others = (len(utterance) - sizes[utterance]).numpy()
    if others.min() < neighbours:
        raise ValueError(
            f"KSG: a frame has {others.min()} frames of other utterances, {neighbours} neighbours are asked"
        )
    rows = max(1, _PAIRS_AT_ONCE // len(utterance))
    terms = np.empty((len(y), len(utterance)))
    for start in range(0, len(utterance), rows):
        block = slice(start, start + rows)
        same = utterance[block, None] == utterance[None, :]
        far_x = _distances(x[block], x).masked_fill_(same, torch.inf)
        for layer, frames in enumerate(y):
            far_y = _distances(frames[block], frames).masked_fill_(same, torch.inf)
            radius = torch.maximum(far_x, far_y).kthvalue(neighbours, dim=1, keepdim=True).values
            near_x, near_y = ((far < radius).sum(1).numpy() for far in (far_x, far_y))
            terms[layer, block] = -digamma(near_x + 1) - digamma(near_y + 1)
    return terms + digamma(neighbours) + digamma(others + 1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of any component: (N, K), (M, K) -> (N, M)."""
    far = torch.zeros(len(a), len(b))
    for one, other in zip(a.T, b.T, strict=True):
        torch.maximum(far, (one[:, None] - other[None, :]).abs_(), out=far)
    return far


def ksg_values(x: Tensor, y: Tensor, utterance: Tensor, settings: KsgSettings, seed: int = 0) -> list[KsgValue]:
    """Return one value per layer: x (F, Dx), y (L, F, Dy) of any scale, utterance (F,) numbers.

    ValueError on non-finite features or fewer than 6 utterances.
    """
    part = _held_out(x, y, utterance, settings, seed)
    found = ksg(part.x, part.y, part.utterance, settings.neighbours)
    twin, truth = _gaussian_twin(part, seed)
    bias = ksg(twin.x, twin.y, twin.utterance, settings.neighbours).mean(1) - truth
    sizes = part.sizes()
    ceiling = float(sizes @ (digamma(sizes.sum() - sizes + 1)) / sizes.sum() - digamma(settings.neighbours))
    error = _standard_error(part, settings, seed)
    result = []
    for layer in range(len(y)):
        value = float(found[layer].mean())
        half = math.hypot(error[layer], bias[layer])
        low, high = value - half, value + half
        result.append(
            KsgValue(
                value, low, high, ceiling, float(bias[layer]), len(part.utterance), part.num_utts, part.explained[layer]
            )
        )
    return result


def _held_out(x: Tensor, y: Tensor, utterance: Tensor, settings: KsgSettings, seed: int) -> Part:
    """Return the held-out frames' components; the training utterances give the axes, none is needed to select."""
    count = len(torch.unique(utterance))
    share = min(1.0 - settings.train_share, max(0.0, 1.0 - 4.0 / count))  # of 6 utterances 4 stay, as the split wants
    shares, most = (0.0, share), (2, settings.held_out_frames)
    return split_by_utterance(x, y, utterance, shares, most, seed, ("pca", settings.components))[2]


def _standard_error(part: Part, settings: KsgSettings, seed: int) -> np.ndarray:
    """Return half of each layer's 95 % interval (L,), from the spread of the values of groups of utterances.

    Resampled terms would make it too narrow by a third: neighbours are shared. nan where no group would have two
    utterances and enough frames.
    """
    groups = min(settings.groups, part.num_utts // 2)
    order = torch.randperm(part.num_utts, generator=torch_generator("ksg groups", seed))
    found = []
    for number in range(groups):
        mask = torch.isin(part.utterance, order[number::groups])
        ids = torch.unique(part.utterance[mask], return_inverse=True)[1]
        if mask.sum() - torch.bincount(ids).max() < settings.neighbours:
            return np.full(len(part.y), np.nan)
        found.append(ksg(part.x[mask], part.y[:, mask], ids, settings.neighbours).mean(1))
    if groups < 2:
        return np.full(len(part.y), np.nan)
    return student_t.ppf(0.975, groups - 1) * np.std(found, axis=0, ddof=1) / math.sqrt(groups)


def _gaussian_twin(part: Part, seed: int) -> tuple[Part, np.ndarray]:
    """Return Gaussian frames with the canonical correlations of x and each layer, and their information (L,)."""
    generator = torch_generator("ksg twin", seed)
    twin_x = torch.randn(part.x.shape, generator=generator)
    noise = torch.randn(part.y[0].shape, generator=generator)
    layers, truth = [], []
    for y in part.y:
        correlation = GaussianScore.fit(part.x, y, part.utterance).correlations
        layer = noise.clone()
        kept = len(correlation)
        layer[:, :kept] = correlation * twin_x[:, :kept] + (1.0 - correlation.square()).sqrt() * noise[:, :kept]
        layers.append(layer)
        truth.append(float(-0.5 * torch.log1p(-correlation.double().square()).sum()))
    return Part(twin_x, torch.stack(layers), part.utterance), np.array(truth)


def ksg_rows(
    system: str,
    features: LayerFeatures,
    reference: tuple[str, Tensor],
    layers: Sequence[int],
    settings: KsgSettings,
    seed: int,
) -> list[LayerValue]:
    """Return two rows per layer: the value with its null on shuffled utterances, and the bias of a Gaussian twin.

    ``reference`` is (name, frames (F, Dx)). The estimator's name says how many components, such as ``ksg4``.
    """
    name, x = reference
    y = stack_layers([features.layers[layer] for layer in layers])
    values = ksg_values(x, y, features.utterance, settings, seed)
    apart = _held_out(x[shuffled_null(features.utterance)], y, features.utterance, settings, seed)
    null = ksg(apart.x, apart.y, apart.utterance, settings.neighbours).mean(1)
    rows = []
    for layer, value, zero in zip(layers, values, null, strict=True):
        common = {
            "system": system,
            "layer": layer,
            "layer_name": features.names[layer],
            "estimator": f"ksg{settings.components}",
            "reference": name,
            "unit": "nats",
            "num_frames": value.num_frames,
            "num_utts": value.num_utts,
        }
        rows.append(
            LayerValue(
                measure="mutual_information",
                value=value.value,
                low=value.low,
                high=value.high,
                null=float(zero),
                ceiling=value.ceiling,
                flag=value.flag,
                **common,
            )
        )
        rows.append(LayerValue(measure="mutual_information_bias", value=value.bias, ceiling=math.nan, **common))
    return rows
