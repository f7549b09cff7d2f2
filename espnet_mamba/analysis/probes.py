"""What a linear classifier reads from a layer: phones of single frames, speakers of whole utterances.

The classifier is linear discriminant analysis: classes share one covariance, shrunk towards its diagonal's mean, and
everything it needs is a sum over frames (counts, class sums, second moments), so it is exact, has no step size or seed
of its own, and no order of frames, batches or shards can change it. Utterances are split in three: those that give the
moments, those that choose the shrinkage (and then join the first), and those that give the accuracy.
N items (frames or utterances), D width, C classes, U utterances.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from espnet_mamba.analysis.reconstruction import BLOCK_FRAMES, Moments, joined, moments
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, sample_names, torch_generator
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue

ESTIMATOR, MAJORITY = "lda", "majority"
_SMALLEST_GROUP = 3  # utterances of a speaker: one for each part


@dataclass(frozen=True)
class ProbeSettings:
    """How the probes are fitted and scored."""

    shrinkage: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 0.1, 0.5)  # share of the covariance replaced by its mean variance
    select_share: float = 0.2  # share of the utterances that choose the shrinkage
    held_out_share: float = 0.3  # share of the utterances that give the accuracy
    null_draws: int = 5  # shufflings of the labels, averaged to the null line
    resamples: int = 1000  # bootstrap resamples over held-out utterances

    def __post_init__(self) -> None:
        object.__setattr__(self, "shrinkage", tuple(float(value) for value in self.shrinkage))
        if not self.shrinkage or not all(0 < value <= 1 for value in self.shrinkage):
            raise ValueError(f"probes: shrinkage: {self.shrinkage} must be numbers above 0 and at most 1")
        if self.null_draws < 1:
            raise ValueError(f"probes: null_draws: {self.null_draws} must be at least 1")


@dataclass(frozen=True)
class _Task:
    """What is classified: classes of items, whose utterance each is, and the three parts' item numbers."""

    measure: str
    reference: str
    labels: Tensor  # (N,) class numbers 0..C-1
    utterance: Tensor  # (N,)
    parts: tuple[Tensor, Tensor, Tensor]
    nulls: list[Tensor]  # (N,) shuffled labels each

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.labels.max()) + 1


def phone_rows(
    system: str,
    features: LayerFeatures,
    phones: np.ndarray,
    layers: Sequence[int],
    settings: ProbeSettings,
    seed: int,
    silence: int | None = 0,
) -> list[LayerValue]:
    """Return ``phone_accuracy`` per layer, a row of the probe and a row of the majority class each.

    ``phones`` (F,) is the phone number of every frame; frames of ``silence`` are left out (None keeps them). The null's
    labels are those of other utterances in time order, so that they change as slowly as the true ones.
    ValueError with another number of labels than frames, with fewer than 6 utterances, or without two phones.
    """
    if len(phones) != len(features.utterance):
        raise ValueError(f"phone probe: {system} has {len(features.utterance)} frames but {len(phones)} phones")
    kept = torch.from_numpy(np.ones(len(phones), bool) if silence is None else phones != silence)
    frames = kept.nonzero()[:, 0]
    labels = torch.unique(torch.from_numpy(phones)[frames], return_inverse=True)[1]
    if len(labels) == 0 or int(labels.max()) == 0:
        raise ValueError(f"phone probe: {system}: the labels hold fewer than two phones; nothing can be told apart")
    utterance = features.utterance[frames]
    named = {name: "" for name in features.utt_ids}
    parts = _parts(features.utt_ids, named, utterance, settings, seed)
    nulls = [labels[_of_another(utterance, draw)] for draw in range(1, settings.null_draws + 1)]
    task = _Task("phone_accuracy", "phones", labels, utterance, parts, nulls)
    rows = []
    for layer in tqdm(layers, desc=f"{system} phone probe", unit="layer", mininterval=5, leave=False):
        rows += _rows(system, features, layer, features.layers[layer][frames], task, settings, seed)
    return rows


def speaker_rows(
    system: str,
    features: LayerFeatures,
    speakers: Mapping[str, str],
    layers: Sequence[int],
    settings: ProbeSettings,
    seed: int,
) -> list[LayerValue]:
    """Return ``speaker_accuracy`` per layer: utterances told by the mean of their frames, speakers known from others.

    ``speakers`` maps utterance to speaker. Every part holds utterances of every speaker; a speaker with fewer than
    three is left out and named, and with fewer than two speakers left there is no row. ValueError names an utterance
    without a speaker.
    """
    unknown = [name for name in features.utt_ids if name not in speakers]
    if unknown:
        raise ValueError(f"speaker probe: no speaker for utterance {unknown[0]!r} ({len(unknown)} in all); see utt2spk")
    owner = {name: speakers[name] for name in features.utt_ids}
    sizes = dict(sorted(Counter(owner.values()).items()))
    known = [name for name, size in sizes.items() if size >= _SMALLEST_GROUP]
    few = [name for name in sizes if name not in known]
    if few:
        print(f"speaker probe: fewer than {_SMALLEST_GROUP} utterances of {', '.join(few)}: left out", flush=True)
    if len(known) < 2:
        print(f"speaker probe: {len(known)} speakers with enough utterances, {system} is left out", flush=True)
        return []
    chosen = torch.tensor([index for index, name in enumerate(features.utt_ids) if owner[name] in known])
    labels = torch.tensor([known.index(owner[features.utt_ids[index]]) for index in chosen])
    item = torch.arange(len(chosen))
    named = {features.utt_ids[index]: owner[features.utt_ids[index]] for index in chosen}
    parts = _parts(list(named), named, item, settings, seed)
    shuffles = [torch_generator("speaker null", seed, draw) for draw in range(settings.null_draws)]
    nulls = [labels[torch.randperm(len(labels), generator=shuffle)] for shuffle in shuffles]
    task = _Task("speaker_accuracy", "speakers", labels, item, parts, nulls)
    rows = []
    for layer in tqdm(layers, desc=f"{system} speaker probe", unit="layer", mininterval=5, leave=False):
        rows += _rows(system, features, layer, _means(features, layer)[chosen], task, settings, seed)
    return rows


def _means(features: LayerFeatures, layer: int) -> Tensor:
    """Return the mean frame of every utterance: (U, D) float64."""
    return torch.stack([part.double().mean(0) for part in features.of_utterance(layer)])


def _parts(
    utt_ids: Sequence[str], group: Mapping[str, str], utterance: Tensor, settings: ProbeSettings, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the items by utterance, within each group of utterances; the draw hangs on utterance names."""
    part_of = dict.fromkeys(utt_ids, 0)
    for name in sorted(set(group.values())):
        own = [utt_id for utt_id in utt_ids if group[utt_id] == name]
        held = sample_names(own, max(1, round(settings.held_out_share * len(own))), seed)
        rest = [utt_id for utt_id in own if utt_id not in held]
        select = sample_names(rest, max(1, round(settings.select_share * len(own))), seed + 1)
        if len(rest) <= len(select):
            raise ValueError(f"probes: {len(own)} utterances leave none to fit on; lower the shares or give more")
        part_of |= dict.fromkeys(held, 2) | dict.fromkeys(select, 1)
    if len(utt_ids) < 6:
        raise ValueError(f"probes: {len(utt_ids)} utterances cannot be split in three parts; give at least 6")
    part = torch.tensor([part_of[utt_id] for utt_id in utt_ids])[utterance]
    return tuple((part == number).nonzero()[:, 0] for number in range(3))  # type: ignore[return-value]


def _of_another(utterance: Tensor, distance: int) -> Tensor:
    """Return the item order (N,) that gives every utterance the items of the ``distance``-th one after it."""
    sizes = torch.unique_consecutive(utterance, return_counts=True)[1]
    starts = torch.cumsum(sizes, 0) - sizes
    shift = 1 + (distance - 1) % max(1, len(sizes) - 1)
    other = torch.arange(len(sizes)).roll(-shift)
    pairs = zip(sizes.tolist(), sizes[other].tolist(), starts[other].tolist(), strict=True)
    return torch.cat([start + torch.arange(size) % size_other for size, size_other, start in pairs])


def _rows(
    system: str,
    features: LayerFeatures,
    layer: int,
    items: Tensor,
    task: _Task,
    settings: ProbeSettings,
    seed: int,
) -> list[LayerValue]:
    """Return the probe's row and the majority class's row for one layer's items (N, D)."""
    held = task.parts[2]
    correct, *null_hits = _held_out_hits(items, task, settings)
    null = np.mean([hits.double().mean() for hits in null_hits])
    seen = torch.cat(task.parts[:2])
    most = torch.bincount(task.labels[seen]).argmax()
    majority = task.labels[held] == most
    values = {ESTIMATOR: (correct, float(null)), MAJORITY: (majority, float("nan"))}
    return [
        LayerValue(
            system=system,
            layer=layer,
            layer_name=features.names[layer],
            measure=task.measure,
            estimator=estimator,
            reference=task.reference,
            value=float(hits.double().mean()),
            **_interval(hits, task.utterance[held], settings.resamples, seed),
            null=level,
            ceiling=1.0,
            unit="fraction",
            num_frames=len(held) if task.measure == "phone_accuracy" else _num_frames(features, task, held),
            num_utts=len(torch.unique(task.utterance[held])),
        )
        for estimator, (hits, level) in values.items()
    ]


def _num_frames(features: LayerFeatures, task: _Task, held: Tensor) -> int:
    return sum(features.sizes[index] for index in held.tolist()) if task.measure == "speaker_accuracy" else len(held)


def _interval(hits: Tensor, utterance: Tensor, resamples: int, seed: int) -> dict[str, float]:
    """Return the 95 % interval of the share of ``hits`` (N,) over resampled utterances."""
    owner = torch.unique(utterance, return_inverse=True)[1].numpy()
    right, all_items = np.bincount(owner, hits.double().numpy()), np.bincount(owner)
    weights = bootstrap_weights(len(all_items), resamples, seed)
    low, high = interval((weights @ right) / (weights @ all_items))
    return {"low": low, "high": high}


def _held_out_hits(items: Tensor, task: _Task, settings: ProbeSettings) -> list[Tensor]:
    """Return which held-out items are hit, with the true labels and with each shuffling.

    Fitted on the first part; the second chooses the shrinkage and then joins the first.
    """
    train, select, held = task.parts
    versions = [task.labels, *task.nulls]
    targets = _OneHot(versions, task.num_classes)
    first, second = (moments(items, targets, part) for part in (train, select))
    fitted, final = _Covariance.of(first), _Covariance.of(joined(first, second))
    hits = []
    for version, labels in enumerate(versions):
        choices = [
            _classify(fitted.discriminant(version, amount, task), items, select) for amount in settings.shrinkage
        ]
        right = [int((found == labels[select]).sum()) for found in choices]
        best = max(range(len(right)), key=lambda index: (right[index], index))  # of equals the smoothest
        fit = final.discriminant(version, settings.shrinkage[best], task)
        hits.append(_classify(fit, items, held) == labels[held])
    return hits


@dataclass(frozen=True)
class _Discriminant:
    """Scores of C classes: (x - mean) / spread @ weight + bias, in float64."""

    mean: Tensor  # (D,)
    spread: Tensor  # (D,)
    weight: Tensor  # (D, C)
    bias: Tensor  # (C,)


@dataclass(frozen=True)
class _Covariance:
    """The total covariance of standardised items, decomposed once for all labels and shrinkages."""

    moments: Moments
    spread: Tensor  # (D,)
    values: Tensor  # (D,)
    vectors: Tensor  # (D, D)

    @classmethod
    def of(cls, found: Moments) -> _Covariance:
        """Decompose."""
        spread = found.spread_x()
        values, vectors = torch.linalg.eigh(found.xx / (spread[:, None] * spread))
        return cls(found, spread, values.clamp(min=0), vectors)

    def discriminant(self, version: int, shrinkage: float, task: _Task) -> _Discriminant:
        """Return linear discriminant analysis with one version of the labels; absent classes are never found.

        The covariance within classes W is the total T less the class means' M Q M', and T is what was decomposed, so
        (W + level)^-1 M = (T + level)^-1 M (1 - Q M' (T + level)^-1 M)^-1, a system of C equations.
        """
        own = slice(version * task.num_classes, (version + 1) * task.num_classes)
        share = self.moments.mean_y[own]  # (C,) prior of each class
        centred = self.moments.xy[:, own] / self.spread[:, None]
        means = self.vectors.T @ torch.where(share > 0, centred / share, 0.0)  # (D, C) about the mean of all
        level = max(float(self.values.mean()), 1e-12)  # a constant layer leaves nothing to divide by
        total = means / ((1.0 - shrinkage) * self.values + shrinkage * level)[:, None]
        inner = torch.eye(len(share), dtype=torch.float64) - (1.0 - shrinkage) * share[:, None] * (means.T @ total)
        weight = torch.linalg.solve(inner.T, total.T).T
        bias = torch.log(share) - 0.5 * (means * weight).sum(0)
        return _Discriminant(self.moments.mean_x, self.spread, self.vectors @ weight, bias)


def _classify(fit: _Discriminant, items: Tensor, chosen: Tensor) -> Tensor:
    """Return the best class of each chosen item (N,)."""
    parts = []
    for block in chosen.split(BLOCK_FRAMES):
        scaled = (items[block].double() - fit.mean) / fit.spread
        parts.append(torch.addmm(fit.bias, scaled, fit.weight).argmax(1))
    return torch.cat(parts)


class _OneHot:
    """Several versions of class numbers (N,) that read as rows of zeros and ones side by side, a block at a time."""

    def __init__(self, versions: Sequence[Tensor], classes: int) -> None:
        self.versions, self.classes = versions, classes
        self.shape = (len(versions[0]), classes * len(versions))

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.cat([torch.nn.functional.one_hot(labels[index], self.classes) for labels in self.versions], dim=1)
