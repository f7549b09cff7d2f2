"""How much k-means codes of a layer know of phones, speakers or words: mutual information of two discrete variables.

The plug-in value of the counts is too high, by about (cells - rows - columns + 1) / 2F for F independent frames, where
cells are those of the table that are used (Miller 1955); the corrected value takes that off. Frames of speech are not
independent and a speaker's least of all, so what to hold a value against is the null: labels of other utterances.
F frames, U utterances, P labels, K codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from espnet_mamba.analysis.sampling import bootstrap_weights, centred_interval, torch_generator
from espnet_mamba.analysis.splits import permuted_utterances
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.targets.kmeans import assign, fit_kmeans

ESTIMATORS = ("plugin", "miller_madow")
MEASURE = "discrete_information"
_CELLS_AT_ONCE = 4_000_000  # of resampled tables


@dataclass(frozen=True)
class DiscreteSettings:
    """``clusters`` K of k-means, ``shuffles`` draws whose mean is the null, ``resamples`` of the bootstrap.

    Words in fewer utterances than ``min_utterances`` are left out (what is said once cannot be told from who said it),
    and of the others the ``max_words`` that most utterances hold are kept (tables of counts are kept per utterance).
    """

    clusters: tuple[int, ...] = (50, 100)
    iterations: int = 30  # most Lloyd iterations
    shuffles: int = 10
    resamples: int = 1000
    min_utterances: int = 2
    max_words: int = 200

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", tuple(int(k) for k in self.clusters))


def information_of_counts(counts: np.ndarray) -> np.ndarray:
    """Return plug-in and corrected information and both entropies (labels, codes) in nats: (W, P, K) -> (W, 4).

    Entropies are plug-in ones. nan where there are no frames. The corrected value may be a little below 0.
    """
    total = counts.sum((1, 2), dtype=np.float64)
    total[total == 0] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        labels, codes, both = (
            _entropy(part, total) for part in (counts.sum(2), counts.sum(1), counts.reshape(len(counts), -1))
        )
        used = [(part > 0).sum(-1) for part in (counts.reshape(len(counts), -1), counts.sum(2), counts.sum(1))]
        bias = (used[0] - used[1] - used[2] + 1) / (2.0 * total)
    plugin = labels + codes - both
    return np.stack([plugin, plugin - bias, labels, codes], 1)


def _entropy(counts: np.ndarray, total: np.ndarray) -> np.ndarray:
    share = counts.astype(np.float64) / total[:, None]
    return -(share * np.log(np.where(share == 0, 1.0, share))).sum(1)


def count_pairs(
    labels: np.ndarray, codes: np.ndarray, utterance: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Count frames per (utterance, label, code): three of (F,) -> ``shape`` (U, P, K); negative labels are left out.

    ValueError when lengths differ or no frame has a label.
    """
    if not len(labels) == len(codes) == len(utterance):
        raise ValueError(f"labels, codes and frames differ in number: {len(labels)}, {len(codes)}, {len(utterance)}")
    known = labels >= 0
    if not known.any():
        raise ValueError("no frame has a label; check that the labels are of these utterances")
    flat = (utterance[known] * shape[1] + labels[known]) * shape[2] + codes[known]
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape).astype(np.float32)


def utterance_labels(features: LayerFeatures, names: Mapping[str, str], what: str) -> np.ndarray:
    """Give every frame the number of its utterance's name, such as its speaker: (F,).

    ``names`` maps utterance to name; ValueError names an utterance that ``what`` leaves out.
    """
    for utt_id in features.utt_ids:
        if utt_id not in names:
            raise ValueError(f"{what}: no label for utterance {utt_id!r}; add it or remove the file")
    numbers = {name: number for number, name in enumerate(sorted(set(names.values())))}
    return np.array([numbers[names[utt_id]] for utt_id in features.utt_ids])[features.utterance.numpy()]


def discrete_rows(
    system: str,
    features: LayerFeatures,
    labels: Mapping[str, np.ndarray],
    layers: Sequence[int],
    settings: DiscreteSettings,
    seed: int,
    fit: LayerFeatures | None = None,
) -> list[LayerValue]:
    """Return the rows of every K, layer and kind of label.

    ``labels`` holds (F,) numbers by kind (phones, speakers, words), negative for frames to leave out (silence).
    k-means is fitted on ``fit``, other utterances of the same system, or on ``features`` itself when None: codes are
    found without labels. ValueError when a K has more clusters than frames to fit them on.
    """
    rows = []
    owner = features.utterance.numpy()
    jobs = [(num_clusters, layer) for num_clusters in settings.clusters for layer in layers]
    for num_clusters, layer in tqdm(jobs, desc=f"{system} codes", unit="k-means", mininterval=5, leave=False):
        frames = (fit or features).layers[layer].float()
        centroids = fit_kmeans(frames, num_clusters, seed, num_iterations=settings.iterations)
        codes = assign(features.layers[layer].float(), centroids).numpy()
        for kind, numbers in labels.items():
            shape = (len(features.utt_ids), int(numbers.max()) + 1, num_clusters)
            counts = count_pairs(numbers, codes, owner, shape)
            null = null_information(numbers, codes, features.utterance, shape, settings.shuffles, seed)
            key = (system, layer, features.names[layer], num_clusters, kind)
            rows += rows_of_counts(key, counts, null, settings.resamples, seed)
    return rows


def null_information(
    labels: np.ndarray, codes: np.ndarray, utterance: torch.Tensor, shape: tuple[int, int, int], draws: int, seed: int
) -> np.ndarray:
    """Return the mean (plug-in, corrected) information when utterances take the labels of others, ``draws`` times.

    Labels move with their whole utterance, so what holds within one (its speaker; slow change) stays as strong as it
    is, and only the connection is cut. nan with fewer than two utterances.
    """
    if shape[0] < 2:
        return np.full(2, np.nan)
    found = []
    for draw in range(draws):
        order = permuted_utterances(utterance, torch_generator("discrete null", seed, draw)).numpy()
        moved = labels[order]
        if (moved >= 0).any():
            counts = count_pairs(moved, codes, utterance.numpy(), shape)
            found.append(information_of_counts(counts.sum(0)[None])[0, :2])
    return np.mean(found, 0) if found else np.full(2, np.nan)


def rows_of_counts(
    key: tuple[str, int, str, int, str], counts: np.ndarray, null: np.ndarray, resamples: int, seed: int
) -> list[LayerValue]:
    """Return plug-in and corrected information, in nats and as a share of H(labels), from counts (U, P, K).

    ``key`` is (system, layer, its name, K, kind of label); ``null`` (2,) of :func:`null_information`.
    """
    system, layer, layer_name, num_clusters, kind = key
    value = information_of_counts(counts.sum(0)[None])[0]
    weights = bootstrap_weights(len(counts), resamples, seed)
    draws = _resampled(counts, weights)
    rows = []
    for column, estimator in enumerate(ESTIMATORS):
        for unit, scale in (("nats", 1.0), ("share of H", value[2])):
            if scale == 0.0:  # one label only: nothing to know, and no share of it
                continue
            spread = draws[:, column] / (draws[:, 2] if unit != "nats" else 1.0)
            low, high = centred_interval(value[column] / scale, spread)
            rows.append(
                LayerValue(
                    system=system,
                    layer=layer,
                    layer_name=layer_name,
                    measure=MEASURE if unit == "nats" else f"{MEASURE}_share",
                    estimator=f"kmeans{num_clusters}_{estimator}",
                    reference=kind,
                    value=float(value[column] / scale),
                    low=low,
                    high=high,
                    null=float(null[column] / scale),
                    ceiling=float(min(value[2], value[3]) / scale),
                    unit=unit,
                    num_frames=int(counts.sum()),
                    num_utts=len(counts),
                )
            )
    return rows


def _resampled(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return :func:`information_of_counts` of every weighting (W, U) of the utterances of counts (U, P, K): (W, 4)."""
    flat = counts.reshape(len(counts), -1)
    size = max(1, _CELLS_AT_ONCE // flat.shape[1])
    parts = [weights[start : start + size].astype(np.float32) @ flat for start in range(0, len(weights), size)]
    return np.concatenate([information_of_counts(part.reshape(-1, *counts.shape[1:])) for part in parts])
