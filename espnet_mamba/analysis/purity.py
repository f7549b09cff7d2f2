"""How well k-means codes of a layer agree with phones: purity, cluster purity, PNMI, with intervals over utterances.

k-means is fitted on one set and scored on another; frames of silence are left out of both (they are most frames of read
speech, every system finds them, and they hide the difference). F frames, U utterances, P phones, K clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from espnet_mamba.analysis.sampling import bootstrap_weights, centred_interval, torch_generator
from espnet_mamba.analysis.settings import PuritySettings
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.data.alignment import frame_labels, require_inside
from espnet_mamba.data.kaldi import Segment, read_ctm
from espnet_mamba.targets.kmeans import assign, fit_kmeans

MEASURES = ("phone_purity", "cluster_purity", "pnmi")
SILENCE = 0


@dataclass(frozen=True)
class LayerCounts:
    """Joint counts of one layer's codes and phones, per utterance: (U, P, K), phone 0 is silence."""

    system: str
    layer: int
    layer_name: str
    num_clusters: int
    fit_purity: float
    counts: np.ndarray

    def spoken(self) -> np.ndarray:
        """Return the counts without silence."""
        return self.counts[:, SILENCE + 1 :]


def number_phones(segments: dict[str, list[Segment]], silence: Sequence[str]) -> dict[str, int]:
    """Number the labels of an alignment in alphabetical order from 1; every silence label is 0."""
    labels = {segment.label for utterance in segments.values() for segment in utterance} - set(silence)
    return {label: number for number, label in enumerate(sorted(labels), start=1)}


def phones_of_frames(
    features: LayerFeatures, segments: Mapping[str, Sequence[Segment]], numbers: Mapping[str, int], where: str
) -> np.ndarray:
    """Return the number of every frame's label (F,), phone or word; :data:`SILENCE` for one without a number.

    ValueError names an utterance that ``where`` has nothing for, and one whose labels go past its audio.
    """
    missing = [utt_id for utt_id in features.utt_ids if utt_id not in segments]
    if missing:
        raise ValueError(
            f"{where}: no {Path(where).stem} for utterance {missing[0]!r} ({len(missing)} in all); "
            "add them or remove the file"
        )
    parts = []
    for utt_id, size in zip(features.utt_ids, features.sizes, strict=True):
        require_inside(utt_id, segments[utt_id], size, where)
        parts.append([numbers.get(label, SILENCE) for label in frame_labels(segments[utt_id], size)])
    return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])


def count_layer(
    system: str,
    layer: int,
    num_clusters: int,
    fit: tuple[LayerFeatures, np.ndarray],
    test: tuple[LayerFeatures, np.ndarray],
    settings: PuritySettings,
    seed: int,
) -> LayerCounts:
    """Fit k-means on spoken frames of ``fit``, count codes and phones on ``test``; each is (features, phones (F,))."""
    features, phones = fit
    frames = features.layers[layer][torch.from_numpy(phones != SILENCE)].float()
    if len(frames) < num_clusters:
        raise ValueError(
            f"purity: {num_clusters} clusters but {len(frames)} spoken frames to fit them on; lower purity.clusters "
            "or give a larger train set"
        )
    centroids = fit_kmeans(frames, num_clusters, seed, num_iterations=settings.iterations)
    num_phones = int(max(phones.max(), test[1].max())) + 1
    fit_counts = _count(assign(frames, centroids).numpy(), phones[phones != SILENCE], num_phones, num_clusters)
    codes = assign(test[0].layers[layer].float(), centroids).numpy()
    owner = test[0].utterance.numpy()
    flat = (owner * num_phones + test[1]) * num_clusters + codes
    shape = (len(test[0].utt_ids), num_phones, num_clusters)
    counts = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(np.float32)
    fit_purity = float(quality_of_counts(fit_counts[None])[0, 0])
    return LayerCounts(system, layer, features.names[layer], num_clusters, fit_purity, counts)


def _count(codes: np.ndarray, phones: np.ndarray, num_phones: int, num_clusters: int) -> np.ndarray:
    flat = np.bincount(phones * num_clusters + codes, minlength=num_phones * num_clusters)
    return flat.reshape(num_phones, num_clusters).astype(np.float32)


def quality_of_counts(counts: np.ndarray) -> np.ndarray:
    """Return phone purity, cluster purity and PNMI of joint counts: (W, P, K) -> (W, 3); nan without frames."""
    total = counts.sum((1, 2), dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        purity = counts.max(1).sum(1, dtype=np.float64) / total
        cluster_purity = counts.max(2).sum(1, dtype=np.float64) / total
        entropies = [_entropy(part, total) for part in (counts.sum(2), counts.sum(1), counts.reshape(len(counts), -1))]
        pnmi = (entropies[0] + entropies[1] - entropies[2]) / entropies[0]
    return np.stack([purity, cluster_purity, pnmi], axis=1)


def _entropy(counts: np.ndarray, total: np.ndarray) -> np.ndarray:
    share = counts.astype(np.float64) / total[:, None]
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1.0)), 0.0).sum(1)


def resample_quality(counts: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return the three measures of bootstrap resamples of utterances: (U, P, K) -> (resamples, 3)."""
    utts, phones, clusters = counts.shape
    weights = bootstrap_weights(utts, num_resamples, seed).astype(np.float32)
    flat = counts.reshape(utts, -1)
    blocks = [
        (block @ flat).reshape(-1, phones, clusters) for block in np.array_split(weights, max(1, num_resamples // 100))
    ]
    return np.concatenate([quality_of_counts(block) for block in blocks])


def purity_rows(layer: LayerCounts, settings: PuritySettings, seed: int) -> list[LayerValue]:
    """Return the rows of one layer: the three measures without silence, phone purity and PNMI also with it."""
    rows = []
    for reference, counts in (("phones", layer.spoken()), ("phones_and_silence", layer.counts)):
        values = quality_of_counts(counts.sum(0)[None])[0]
        null = quality_of_counts(_without_dependence(counts.sum(0), seed)[None])[0]
        resampled = resample_quality(counts, settings.resamples, seed)
        for column, measure in enumerate(MEASURES):
            low, high = centred_interval(values[column], resampled[:, column])
            rows.append(_row(layer, measure, reference, values[column], (low, high), null[column], counts))
    used = float((layer.spoken().sum((0, 1)) > 0).sum())
    counts = layer.spoken()
    used_row = _row(layer, "used_clusters", "phones", used, (float("nan"),) * 2, float("nan"), counts)
    return [*rows, used_row]


def _row(
    layer: LayerCounts,
    measure: str,
    reference: str,
    value: float,
    bounds: tuple[float, ...],
    null: float,
    counts: np.ndarray,
) -> LayerValue:
    is_count = measure == "used_clusters"
    return LayerValue(
        system=layer.system,
        layer=layer.layer,
        layer_name=layer.layer_name,
        measure=measure,
        estimator=f"kmeans{layer.num_clusters}",
        reference=reference,
        value=float(value),
        low=bounds[0],
        high=bounds[1],
        null=float(null),
        ceiling=float(layer.num_clusters) if is_count else 1.0,
        unit="clusters" if is_count else "fraction",
        num_frames=int(counts.sum()),
        num_utts=len(counts),
    )


def _without_dependence(counts: np.ndarray, seed: int) -> np.ndarray:
    """Return counts of the same phones and codes with the frames' codes shuffled: what chance gives at this size."""
    number = counts.astype(np.int64)
    phones = np.repeat(np.arange(number.shape[0]), number.sum(1))
    codes = np.repeat(np.arange(number.shape[1]), number.sum(0))
    order = torch.randperm(len(codes), generator=torch_generator("purity null", seed)).numpy()
    return _count(codes[order], phones, *number.shape)


class PurityTask:
    """Counts codes against phones, system by system; phones are numbered once for all.

    Args:
        alignments: phones.ctm of the set that k-means is fitted on, and of the one that is scored.
        settings: K, silence.
        seed: of every draw.
    """

    def __init__(self, alignments: Sequence[Path], settings: PuritySettings, seed: int) -> None:
        self.segments = [read_ctm(path) for path in alignments]
        self.paths, self.settings, self.seed = alignments, settings, seed
        self.numbers = number_phones({k: v for part in self.segments for k, v in part.items()}, settings.silence)

    def count(self, system: str, fit: LayerFeatures, test: LayerFeatures) -> list[LayerCounts]:
        """Return the counts of every layer for every K; ValueError as :func:`phones_of_frames`."""
        sets = zip((fit, test), self.segments, self.paths, strict=True)
        pair = [(features, phones_of_frames(features, seen, self.numbers, str(path))) for features, seen, path in sets]
        jobs = [(k, layer) for k in self.settings.clusters for layer in range(len(fit.names))]
        progress = tqdm(jobs, desc=f"{system} purity", unit="k-means", mininterval=5)
        return [count_layer(system, layer, k, pair[0], pair[1], self.settings, self.seed) for k, layer in progress]
