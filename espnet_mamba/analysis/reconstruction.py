"""How much of log-mel can be read back from a layer: linear and small MLP decoders, held-out R^2.

Paper 1 explains its curves by "reconstruction"; this measures it. R^2 is 1 - squared error / squared distance from the
training mean, each dimension of the reference scaled by its training deviation first, over utterances that neither
fitting nor choosing saw. 1 is perfect, 0 is what the mean gives, and a decoder that learnt noise is below 0.
F frames, D width of a layer, M width of the reference, L layers, R seeds, G = L * R decoders, U utterances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from espnet_mamba.analysis.critics import Adam, Parameters, linear_weights
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, sample_names, torch_generator
from espnet_mamba.analysis.splits import shuffled_null
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue

MEASURE = "reconstruction"
BLOCK_FRAMES = 4096  # sums are made of blocks of this size, added in order: nothing else can change a digit
_ZERO_SPREAD = 1e-6


@dataclass(frozen=True)
class ReconstructionSettings:
    """How decoders are fitted and chosen."""

    penalties: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of ridge, in variances of a scaled feature
    hidden: int = 128  # units of the MLP's hidden layer; 0 leaves the MLP out
    steps: int = 300  # optimiser steps
    batch_frames: int = 256  # frames per step and decoder
    learning_rate: float = 3e-3  # of Adam, to 0 by a cosine
    weight_decay: float = 0.1  # decoupled, times the learning rate
    check_every: int = 50  # steps from one look at the select part to the next
    check_frames: int = 1000  # most frames of the select part, evenly spaced, that choose the MLP's step
    seeds: int = 2  # MLPs per layer
    select_share: float = 0.2  # share of the utterances that choose the penalty and the step
    held_out_share: float = 0.3  # share of the utterances that give the value
    resamples: int = 1000  # bootstrap resamples over held-out utterances

    def __post_init__(self) -> None:
        object.__setattr__(self, "penalties", tuple(float(value) for value in self.penalties))
        if not self.penalties or min(self.penalties) <= 0:
            raise ValueError(f"reconstruction: penalties: {self.penalties} must be positive numbers")


@dataclass(frozen=True)
class Moments:
    """Means and centred second moments of two sets of features over the same frames, in float64."""

    count: int
    mean_x: Tensor  # (D,)
    mean_y: Tensor  # (M,)
    xx: Tensor  # (D, D), divided by count
    xy: Tensor  # (D, M)
    var_y: Tensor  # (M,)

    def spread_x(self) -> Tensor:
        """Standard deviations (D,); infinite where a dimension is constant, so that it becomes 0."""
        return _spread(self.xx.diagonal(), self.mean_x)

    def spread_y(self) -> Tensor:
        """Standard deviations (M,), as for x."""
        return _spread(self.var_y, self.mean_y)


def _spread(variance: Tensor, mean: Tensor) -> Tensor:
    deviation = variance.clamp(min=0).sqrt()
    return torch.where(deviation <= _ZERO_SPREAD * mean.abs().clamp(min=_ZERO_SPREAD), torch.inf, deviation)


class Rows(Protocol):
    """Anything that gives rows (N, M) for frame numbers (N,): a tensor, or what makes them when asked."""

    shape: Sequence[int]

    def __getitem__(self, index: Tensor) -> Tensor: ...


def moments(x: Tensor, y: Rows, frames: Tensor) -> Moments:
    """Return the moments of x (F, D) and y (F, M) over the frames with the numbers ``frames`` (N,)."""
    blocks = frames.split(BLOCK_FRAMES)
    # Sums about a point near the mean lose no digits to a large mean; any fixed point will do.
    origin_x, origin_y = (part[blocks[0]].double().mean(0) for part in (x, y))
    dims, width = x.shape[1], y.shape[1]
    sum_x, sum_y, sum_yy = (torch.zeros(size, dtype=torch.float64) for size in (dims, width, width))
    xx, xy = (torch.zeros(dims, size, dtype=torch.float64) for size in (dims, width))
    for block in blocks:
        block_x, block_y = x[block].double() - origin_x, y[block].double() - origin_y
        sum_x += block_x.sum(0)
        sum_y += block_y.sum(0)
        sum_yy += block_y.square().sum(0)
        xx.addmm_(block_x.T, block_x)
        xy.addmm_(block_x.T, block_y)
    count = len(frames)
    shift_x, shift_y = sum_x / count, sum_y / count
    return Moments(
        count,
        origin_x + shift_x,
        origin_y + shift_y,
        xx / count - shift_x[:, None] * shift_x,
        xy / count - shift_x[:, None] * shift_y,
        sum_yy / count - shift_y.square(),
    )


def joined(first: Moments, second: Moments) -> Moments:
    """Return the moments of the frames of both."""
    count = first.count + second.count
    share, other = first.count / count, second.count / count
    gap_x, gap_y = second.mean_x - first.mean_x, second.mean_y - first.mean_y
    return Moments(
        count,
        first.mean_x + other * gap_x,
        first.mean_y + other * gap_y,
        share * first.xx + other * second.xx + share * other * gap_x[:, None] * gap_x,
        share * first.xy + other * second.xy + share * other * gap_x[:, None] * gap_y,
        share * first.var_y + other * second.var_y + share * other * gap_y.square(),
    )


def split_frames(features: LayerFeatures, shares: tuple[float, float], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the frame numbers of the train, select and held-out utterances; the draw hangs on utterance names.

    ValueError with fewer than 6 utterances: each part needs two.
    """
    count = len(features.utt_ids)
    num_select, num_held = (max(2, round(share * count)) for share in shares)
    if count - num_select - num_held < 2:
        raise ValueError(f"{count} utterances cannot be split in three parts of 2; give at least 6")
    held = set(sample_names(features.utt_ids, num_held, seed))
    rest = [name for name in features.utt_ids if name not in held]
    select = set(sample_names(rest, num_select, seed + 1))
    part_of = torch.tensor([2 if name in held else 1 if name in select else 0 for name in features.utt_ids])
    part = part_of[features.utterance]
    return tuple((part == number).nonzero()[:, 0] for number in range(3))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Linear:
    """Ridge from scaled frames to the scaled reference, and the scaling."""

    mean_x: Tensor  # (D,)
    spread_x: Tensor  # (D,)
    weight: Tensor  # (D, M)

    def scale(self, frames: Tensor) -> Tensor:
        """Standardise frames (N, D) with the training moments."""
        return (frames.float() - self.mean_x) / self.spread_x


def fit_ridge(train: Moments, select: Moments, penalties: Sequence[float], groups: int = 1) -> Tensor:
    """Return ridge weights (D, M) between standardised features, with the penalty that is best on ``select``.

    Each of ``groups`` equal parts of the reference's columns gets its own penalty. Needs the moments alone: one
    decomposition of the training correlations serves every penalty, and the error on the select part is a quadratic
    form of its own moments. Fewer frames than dimensions are no obstacle (penalties > 0).
    """
    spread_x, spread_y = train.spread_x(), train.spread_y()
    values, vectors = torch.linalg.eigh(train.xx / (spread_x[:, None] * spread_x))
    target = vectors.T @ (train.xy / (spread_x[:, None] * spread_y))
    shift_x, shift_y = (select.mean_x - train.mean_x) / spread_x, (select.mean_y - train.mean_y) / spread_y
    xx = select.xx / (spread_x[:, None] * spread_x) + shift_x[:, None] * shift_x
    xy = select.xy / (spread_x[:, None] * spread_y) + shift_x[:, None] * shift_y
    best = [torch.empty(0)] * groups
    least = [math.inf] * groups
    for penalty in penalties:
        weight = vectors @ (target / (values.clamp(min=0) + penalty)[:, None])
        errors = ((xx @ weight - 2.0 * xy) * weight).sum(0)
        for group, (part, error) in enumerate(zip(weight.chunk(groups, 1), errors.chunk(groups), strict=True)):
            if float(error.sum()) < least[group]:
                best[group], least[group] = part, float(error.sum())
    return torch.cat(best, dim=1)


def reconstruction_rows(
    system: str,
    features: LayerFeatures,
    reference: tuple[str, Tensor],
    layers: Sequence[int],
    settings: ReconstructionSettings,
    seed: int,
) -> list[LayerValue]:
    """Return one row per decoder (``ridge``, ``mlp``) and layer: held-out R^2 of the reference's frames.

    ``reference`` is (name, frames (F, M)), in the order of the layers' frames. ``null`` is the same procedure with the
    reference of another utterance (one seed). ValueError when the reference has another number of frames, holds NaN or
    is constant, and when there are fewer than 6 utterances.
    """
    name, target = reference
    _check(system, name, features, target)
    both = torch.cat([target, target[shuffled_null(features.utterance)]], dim=1).float()
    parts = split_frames(features, (settings.select_share, settings.held_out_share), seed)
    truth_data, null_data = _fit_linear(features, both, layers, parts, settings)
    truth = _score(truth_data, parts, features.utterance, settings, seed)
    null = _score(null_data, parts, features.utterance, replace(settings, seeds=1), seed)
    weights = bootstrap_weights(len(truth.total), settings.resamples, seed)
    rows = []
    for estimator, errors_of in truth.errors.items():
        for index, (layer, errors) in enumerate(zip(layers, errors_of, strict=True)):  # errors (R, U)
            by_seed = 1.0 - errors.sum(1) / truth.total.sum()
            low, high = interval(1.0 - (weights @ errors.mean(0)) / (weights @ truth.total))
            rows.append(
                LayerValue(
                    system=system,
                    layer=layer,
                    layer_name=features.names[layer],
                    measure=MEASURE,
                    estimator=estimator,
                    reference=name,
                    value=float(by_seed.mean()),
                    low=low,
                    high=high,
                    null=float(1.0 - null.errors[estimator][index].sum() / null.total.sum()),
                    ceiling=1.0,
                    unit="R^2",
                    num_frames=len(parts[2]),
                    num_utts=len(truth.total),
                    num_seeds=len(by_seed),
                    seed_sd=float(by_seed.std(ddof=1)) if len(by_seed) > 1 else float("nan"),
                )
            )
    return rows


def _check(system: str, name: str, features: LayerFeatures, target: Tensor) -> None:
    if len(target) != len(features.utterance):
        raise ValueError(
            f"reconstruction: {system} has {len(features.utterance)} frames, {name} has {len(target)}; "
            "both must be on one grid of frames"
        )
    if not torch.isfinite(target).all():
        raise ValueError(f"reconstruction: {name} holds NaN or infinity; check the audio (stage 2)")
    if bool((target == target[0]).all()):
        raise ValueError(f"reconstruction: {name} is constant, there is nothing to reconstruct")


def _fit_linear(
    features: LayerFeatures,
    both: Tensor,
    layers: Sequence[int],
    parts: tuple[Tensor, Tensor, Tensor],
    settings: ReconstructionSettings,
) -> tuple[_Data, _Data]:
    """Fit ridge from every layer to the true and the null reference, side by side in ``both`` (F, 2M)."""
    linear, scaled = [], both
    for layer in layers:
        train, select = (moments(features.layers[layer], both, part) for part in parts[:2])
        weight = fit_ridge(train, select, settings.penalties, groups=2).float()
        linear.append([_Linear(train.mean_x.float(), train.spread_x().float(), part) for part in weight.chunk(2, 1)])
        scaled = (both - train.mean_y.float()) / train.spread_y().float()  # the same for every layer
    frames = [features.layers[layer] for layer in layers]
    truth, null = scaled.chunk(2, dim=1)
    return (
        _Data(list(layers), frames, [pair[0] for pair in linear], truth),
        _Data(list(layers), frames, [pair[1] for pair in linear], null),
    )


@dataclass(frozen=True)
class _Scores:
    """Squared errors per decoder, (L, R, U) each, and squared distances from the training mean (U,), held out."""

    errors: dict[str, np.ndarray]
    total: np.ndarray


def _score(
    data: _Data,
    parts: tuple[Tensor, Tensor, Tensor],
    utterance: Tensor,
    settings: ReconstructionSettings,
    seed: int,
) -> _Scores:
    """Train the MLPs on what ridge leaves, and sum every decoder's errors over each held-out utterance."""
    train, select, held = parts
    owner = torch.unique(utterance[held], return_inverse=True)[1].numpy()
    decoders = None
    if settings.hidden:
        decoders = _train_mlps(data, train, _thin(select, settings.check_frames), settings, seed)
    sums = [
        np.stack(
            [np.bincount(owner, run) for run in data.errors(index, held, decoders, settings.seeds).double().numpy()]
        )
        for index in range(len(data.layers))
    ]
    errors = {"ridge": np.stack([runs[:1] for runs in sums])}
    if decoders is not None:
        errors["mlp"] = np.stack([runs[1:] for runs in sums])
    return _Scores(errors, np.bincount(owner, data.target[held].square().sum(1).double().numpy()))


def _thin(frames: Tensor, most: int) -> Tensor:
    if len(frames) <= most:
        return frames
    return frames[torch.linspace(0, len(frames) - 1, most).round().long()]


@dataclass
class _Decoders(Parameters):
    """What the MLP adds to ridge: gelu(x W1 + b1) W2, G of them W2 begins at 0, so all begin at ridge."""

    weight1: Tensor  # (G, D, H)
    bias1: Tensor  # (G, 1, H)
    weight2: Tensor  # (G, H, M)

    def __call__(self, x: Tensor) -> Tensor:
        """Map x (G, N, D) to (G, N, M)."""
        return torch.bmm(F.gelu(torch.baddbmm(self.bias1, x, self.weight1)), self.weight2)

    def of(self, index: Tensor) -> _Decoders:
        """Return some of the decoders."""
        return _Decoders(*[tensor[index] for tensor in self.tensors()])


@dataclass(frozen=True)
class _Data:
    """Layers as they are kept, how each is scaled and mapped by ridge, and the scaled reference (F, M)."""

    numbers: list[int]
    layers: list[Tensor]
    linear: list[_Linear]
    target: Tensor

    def width(self) -> int:
        """Return the widest layer's width; narrower ones are filled with zeros, which carry nothing."""
        return max(layer.shape[1] for layer in self.layers)

    def batch(self, index: int, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Return scaled frames (N, D) of one layer, and what ridge leaves of the reference (N, M)."""
        linear = self.linear[index]
        x = linear.scale(self.layers[index][frames])
        return F.pad(x, (0, self.width() - x.shape[1])), self.target[frames] - x @ linear.weight

    @torch.no_grad()
    def errors(self, index: int, frames: Tensor, decoders: _Decoders | None, seeds: int) -> Tensor:
        """Return the squared error of every frame: (1 + R, N), ridge first, then the MLP of each seed."""
        mine = decoders.of(torch.arange(seeds) * len(self.layers) + index) if decoders else None
        parts = []
        for block in frames.split(BLOCK_FRAMES):
            x, left = self.batch(index, block)
            found = [left[None]]
            if mine is not None:
                found.append(left - mine(x.expand(seeds, -1, -1)))
            parts.append(torch.cat(found).square().sum(2))
        return torch.cat(parts, dim=1)


def _train_mlps(data: _Data, train: Tensor, select: Tensor, settings: ReconstructionSettings, seed: int) -> _Decoders:
    """Train all layers' decoders, of all seeds, as one batched model; return each at its best step on ``select``."""
    num_layers, runs = len(data.layers), settings.seeds
    # Draws hang on seed, run and layer: which layers are decoded together changes no value.
    draws = [torch_generator("decoder", seed, run, layer) for run in range(runs) for layer in data.numbers]
    decoders = _Decoders(
        linear_weights(draws, (data.width(), settings.hidden), data.width()) * 3**0.5,
        linear_weights(draws, (1, settings.hidden), 1),
        torch.zeros(len(draws), settings.hidden, data.target.shape[1]),
    )
    best = [tensor.clone() for tensor in decoders.tensors()]
    least = torch.full((len(draws),), torch.inf)
    decoders.require_grad()
    optimiser = Adam(decoders, settings.learning_rate)
    batches = [torch_generator("decoder batches", seed, run) for run in range(runs)]
    check = [torch.stack(part) for part in zip(*[data.batch(i, select) for i in range(num_layers)], strict=True)]
    for step in tqdm(range(settings.steps + 1), desc="decoders", unit="step", mininterval=5, leave=False):
        if step % settings.check_every == 0 or step == settings.steps:
            with torch.no_grad():
                groups = zip(*[part.chunk(runs) for part in decoders.tensors()], strict=True)
                errors = [(check[1] - _Decoders(*group)(check[0])).square().mean((1, 2)) for group in groups]
                better = torch.cat(errors) < least
                least = torch.where(better, torch.cat(errors), least)
                for kept, current in zip(best, decoders.tensors(), strict=True):
                    kept[better] = current[better]
        if step == settings.steps:
            break
        chosen = [train[torch.randint(len(train), (settings.batch_frames,), generator=draw)] for draw in batches]
        pairs = [data.batch(layer, frames) for frames in chosen for layer in range(num_layers)]
        x, left = (torch.stack(part) for part in zip(*pairs, strict=True))
        (left - decoders(x)).square().mean((1, 2)).sum().backward()
        optimiser.learning_rate = 0.5 * settings.learning_rate * (1.0 + math.cos(math.pi * step / settings.steps))
        optimiser.step()
        with torch.no_grad():
            for tensor in decoders.tensors():
                tensor.mul_(1.0 - optimiser.learning_rate * settings.weight_decay)
    return _Decoders(*best)
