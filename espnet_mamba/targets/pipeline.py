"""Stages 3 and 5: fit k-means on a sample of training frames, label every frame, score the labels against phones.

Features of the corpus are never stored: one pass samples, one pass assigns.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from espnet_mamba.data.alignment import frame_labels
from espnet_mamba.data.files import atomic_path, write_json
from espnet_mamba.data.kaldi import read_ctm
from espnet_mamba.data.manifest import Utterance, read_manifest
from espnet_mamba.targets.features import FeatureSource, iterate_features, open_features
from espnet_mamba.targets.kmeans import assign, fit_kmeans
from espnet_mamba.targets.labels import write_labels
from espnet_mamba.targets.quality import cluster_quality

SILENCE = "sil"


@dataclass(frozen=True)
class TargetOptions:
    """What a targets stage is told."""

    features: str  # mfcc100, mfcc, logmel, or a model folder
    layer: int  # of the model; 0 for spectral features
    num_clusters: int
    max_frames: int = 500_000  # frames kept in memory to fit on
    num_iterations: int = 50
    seed: int = 0
    num_shards: int = 1
    device: str = "cpu"


def make_targets(dump_dir: Path, out_dir: Path, sets: Sequence[str], options: TargetOptions) -> dict[str, object]:
    """Fit on the first set, label all ``sets`` of ``dump_dir``, write labels, centroids and ``quality.json``.

    Returns:
        What ``quality.json`` holds.

    Raises:
        ValueError: the layer does not exist, or there are fewer frames than clusters.
    """
    source = open_features(options.features, options.device)
    if not 0 <= options.layer < len(source.names):
        raise ValueError(f"{options.features}: layer {options.layer} does not exist; it has {', '.join(source.names)}")
    manifests = {name: read_manifest(dump_dir / name) for name in sets}
    sample = _sample_frames(source, manifests[sets[0]], options)
    centroids = fit_kmeans(
        sample, options.num_clusters, options.seed, options.num_iterations, num_shards=options.num_shards
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(out_dir / "centroids.safetensors") as temporary:
        save_file({"centroids": centroids}, temporary)
    quality = {}
    for name, utterances in manifests.items():
        labels = _label_set(source, utterances, centroids, options.layer, name)
        write_labels(out_dir / f"{name}.npy", labels)
        ctm = dump_dir / name / "phones.ctm"
        if ctm.is_file():
            quality[name] = _score(labels, ctm, source.hop, options.num_clusters)
    result = {
        "source": options.features,
        "layer": options.layer,
        "rate_hz": 16000 / source.hop,
        "num_clusters": options.num_clusters,
        "fit_frames": len(sample),
        "sets": quality,
    }
    write_json(out_dir / "quality.json", result)
    return result


def _sample_frames(source: FeatureSource, utterances: Sequence[Utterance], options: TargetOptions) -> Tensor:
    """Return at most ``max_frames`` frames of whole utterances, chosen by a hash of their ids, in order of ids."""
    order = sorted(utterances, key=lambda u: (zlib.crc32(f"{options.seed} {u.utt_id}".encode()), u.utt_id))
    chosen, total = [], 0
    for utterance in order:
        total += max(0, (utterance.num_samples - 400) // source.hop + 1)
        if chosen and total > options.max_frames:
            break
        chosen.append(utterance)
    frames = {}
    progress = tqdm(iterate_features(source, chosen), total=len(chosen), desc="sample", unit="utt", mininterval=5)
    for utterance, layers in progress:
        frames[utterance.utt_id] = layers[options.layer].clone()
    return torch.cat([frames[utt_id] for utt_id in sorted(frames)])


def _label_set(
    source: FeatureSource, utterances: Sequence[Utterance], centroids: Tensor, layer: int, name: str
) -> dict[str, np.ndarray]:
    progress = tqdm(
        iterate_features(source, utterances), total=len(utterances), desc=f"label {name}", unit="utt", mininterval=5
    )
    return {utterance.utt_id: assign(layers[layer], centroids).numpy() for utterance, layers in progress}


def _score(labels: dict[str, np.ndarray], ctm: Path, hop: int, num_clusters: int) -> dict[str, dict[str, float]]:
    """Score all frames, and those that are not silence: silence dominates and hides differences."""
    segments = read_ctm(ctm)
    utt_ids = [utt_id for utt_id in sorted(labels) if utt_id in segments]
    phones = [p for u in utt_ids for p in frame_labels(segments[u], len(labels[u]), hop=hop)]
    names, numbers = np.unique(phones, return_inverse=True)
    clusters = np.concatenate([labels[u] for u in utt_ids])
    speech = names[numbers] != SILENCE
    return {
        "all": cluster_quality(numbers, clusters, num_clusters)._asdict(),
        "no_silence": cluster_quality(numbers[speech], clusters[speech], num_clusters)._asdict(),
    }
