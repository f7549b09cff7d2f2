"""Stages 3 and 5 in four steps: sample training frames, fit k-means, label every frame, merge and score.

Features of the corpus are never stored: one pass over the sampled utterances, one pass that assigns. ``sample`` and
``label`` may be shared by jobs, each with a shard of the batches; ``fit`` and ``merge`` are one job. Every step leaves
what it finished, and does nothing where that stands.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from espnet_mamba.data.files import atomic_path, write_json
from espnet_mamba.data.manifest import Utterance, read_manifest
from espnet_mamba.targets import parts
from espnet_mamba.targets.extraction import extract, refuse_many
from espnet_mamba.targets.features import FeatureSource, open_layer, plan_batches
from espnet_mamba.targets.kmeans import assign, fit_kmeans
from espnet_mamba.targets.labels import MAX_CLASSES
from espnet_mamba.targets.sampling import choose_utterances, join_frames
from espnet_mamba.targets.scoring import score_labels
from espnet_mamba.targets.shards import Shard, digest_of, digest_of_bytes, digest_of_source, digest_of_utterances

BATCH_SECONDS = {"cpu": 48.0, "cuda": 160.0}  # of audio with padding; a label hangs on it as far as rounding goes
PARTS = "shards"  # the folder of what is not merged yet


@dataclass(frozen=True)
class TargetOptions:
    """What a targets stage is told."""

    features: str  # mfcc100, mfcc, logmel, or a model folder
    layer: int  # of the model; 0 for spectral features
    num_clusters: int
    max_frames: int = 500_000  # frames kept in memory to fit on
    num_iterations: int = 50
    seed: int = 0
    num_threads: int | None = None  # of this process, None: as PyTorch has it; never changes a result
    device: str = "cpu"


def make_targets(dump_dir: Path, out_dir: Path, sets: Sequence[str], options: TargetOptions) -> dict[str, Any]:
    """Do all steps here: fit on the first set, label all ``sets`` of ``dump_dir``, merge and score.

    Returns:
        What ``quality.json`` holds.

    Raises:
        ValueError: the layer does not exist, there are fewer frames than clusters, or too many recordings are bad.
    """
    steps = TargetSteps(dump_dir, out_dir, sets, options, 1)
    if steps.pending("fit"):
        frames, bad = steps.collect(Shard(1, 1))
        steps.fit_on({utt_id: len(rows) for utt_id, rows in frames.items()}, frames.pop, bad)
    steps.label(Shard(1, 1))
    return steps.merge()


class TargetSteps:
    """The steps of a targets stage that ``count`` jobs share.

    Args:
        dump_dir: checked data, one folder per set.
        out_dir: where labels, centroids and quality.json go; parts go to its folder ``shards``.
        sets: to label; the first one is fitted on, and the others are labelled by its centroids.
        options: what the stage is told.
        count: number of shards.

    Raises:
        ValueError: more clusters than a label can hold.
    """

    def __init__(self, dump_dir: Path, out_dir: Path, sets: Sequence[str], options: TargetOptions, count: int) -> None:
        self.dump_dir, self.out_dir, self.sets, self.options, self.count = dump_dir, out_dir, sets, options, count
        self.centroids = out_dir / "centroids.safetensors"
        if options.num_clusters > MAX_CLASSES:
            raise ValueError(f"--num_clusters {options.num_clusters}: a label has 16 bits, {MAX_CLASSES} at most")

    @functools.cached_property
    def _manifests(self) -> dict[str, list[Utterance]]:
        return {name: read_manifest(self.dump_dir / name) for name in self.sets}

    @functools.cached_property
    def _digests(self) -> dict[str, str]:
        """What a sample and a fit hang on."""
        o = self.options
        train = digest_of_utterances(self._manifests[self.sets[0]])
        sample = digest_of(digest_of_source(o.features), o.layer, o.seed, o.max_frames, train)
        return {"sample": sample, "fit": digest_of(sample, o.num_clusters, o.num_iterations)}

    def _label_digest(self, name: str) -> str:
        """What a set's labels hang on: the very centroids, since another machine would round a fit otherwise."""
        centroids = self._read_centroids().numpy().tobytes()
        return digest_of(
            self._digests["fit"], digest_of_bytes([centroids]), digest_of_utterances(self._manifests[name])
        )

    def _read_centroids(self) -> Tensor:
        if self.pending("fit"):
            raise FileNotFoundError(f"{self.centroids}: not there, or of other inputs or options; run --step fit")
        return safe_open(self.centroids, "pt").get_tensor("centroids")

    def _part(self, kind: str, shard: Shard) -> Path:
        return self.out_dir / PARTS / f"{kind}.{shard.tag}.json"

    def _all_parts(self, kind: str) -> list[Path]:
        return [self._part(kind, Shard(number, self.count)) for number in range(1, self.count + 1)]

    def _open(self, shard: Shard) -> FeatureSource:
        device = self.options.device
        if device == "cuda" and self.count > 1:  # where a job sees several GPUs, neighbours take different ones
            device = f"cuda:{(shard.number - 1) % max(1, torch.cuda.device_count())}"
        return open_layer(self.options.features, self.options.layer, device)

    def _batches(self, utterances: Sequence[Utterance], shard: Shard) -> Sequence[list[Utterance]]:
        """Return whole batches of the corpus: what an utterance is padded with must not hang on the shards."""
        return shard.of(plan_batches(utterances, BATCH_SECONDS.get(self.options.device.split(":")[0], 48.0)))

    def _threads(self) -> int:
        return self.options.num_threads or torch.get_num_threads()

    def pending(self, step: str) -> list[int]:
        """Return the shards (of ``fit`` and ``merge``: [1]) that a step still has to do."""
        if step == "merge":
            return [1]
        fitted = self.centroids.is_file() and _metadata(self.centroids).get("digest") == self._digests["fit"]
        if fitted and step in ("sample", "fit"):
            return []
        if step == "fit":
            return [1]
        if step == "label" and not fitted:
            return list(range(1, self.count + 1))
        kinds = {"sample": self._digests["sample"]}
        if step == "label":
            kinds = {f"label.{name}": self._label_digest(name) for name in self.sets}
        done = [[parts.is_done(path, digest) for path in self._all_parts(kind)] for kind, digest in kinds.items()]
        return [number for number, each in enumerate(zip(*done, strict=True), 1) if not all(each)]

    def collect(self, shard: Shard) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Extract a shard of the sample: utterance -> frames ``(T, D)``, and the bad ones -> reason."""
        source = self._open(shard)
        chosen = choose_utterances(
            self._manifests[self.sets[0]], source.hop, self.options.max_frames, self.options.seed
        )
        what = f"sample {shard.number}/{shard.count}"
        return _gather(source, self._batches(chosen, shard), _keep, self._threads(), what)

    def sample(self, shard: Shard) -> None:
        """Extract a shard of the sample and leave it in a file."""
        path, digest = self._part("sample", shard), self._digests["sample"]
        if shard.number not in self.pending("sample"):
            print(f"sample {shard.number}/{shard.count}: done already", flush=True)
            return
        frames, bad = self.collect(shard)
        parts.save_frames(path, digest, frames, bad)

    def fit(self) -> None:
        """Fit on the sample that all shards have left."""
        if self.pending("fit"):
            self.fit_on(*parts.open_frames(self._all_parts("sample"), self._digests["sample"]))
        else:
            print("fit: done already", flush=True)

    def fit_on(self, sizes: Mapping[str, int], read: Callable[[str], Tensor], bad: dict[str, str]) -> None:
        """Fit on the frames ``(T, D)`` that ``read`` returns of each utterance, and write the centroids."""
        refuse_many(bad, len(sizes) + len(bad), "sample")
        o = self.options
        sample = join_frames(sizes, read, o.max_frames)
        centroids = fit_kmeans(sample, o.num_clusters, o.seed, o.num_iterations, num_threads=self._threads())
        metadata = {"digest": self._digests["fit"], "fit_frames": str(len(sample))}
        with atomic_path(self.centroids) as temporary:
            save_file({"centroids": centroids}, temporary, metadata=metadata)

    def label(self, shard: Shard) -> None:
        """Label a shard of every set and leave the labels in a file per set.

        Raises:
            FileNotFoundError: there are no centroids of these inputs and options.
        """
        centroids, source = self._read_centroids(), None
        for name, utterances in self._manifests.items():
            kind, what = f"label.{name}", f"label {name} {shard.number}/{shard.count}"
            path, digest = self._part(kind, shard), self._label_digest(name)
            if parts.is_done(path, digest):
                print(f"{what}: done already", flush=True)
                continue
            source = source or self._open(shard)
            use = functools.partial(_assign, centroids=centroids.to(getattr(source, "device", "cpu")))
            labels, bad = _gather(source, self._batches(utterances, shard), use, self._threads(), what)
            parts.save_labels(path, digest, labels, bad, source.hop)

    def merge(self) -> dict[str, Any]:
        """Join the shards' labels, score them where there are alignments, write quality.json and return what it holds.

        Raises:
            FileNotFoundError: a shard's labels are missing.
            ValueError: more than a tenth of a set's utterances are bad.
        """
        scores, left_out, hop = {}, {}, 0
        for name in self.sets:
            kind, labels = f"label.{name}", self.out_dir / f"{name}.npy"
            bad, hop = parts.merge_labels(self._all_parts(kind), self._label_digest(name), labels)
            refuse_many(bad, len(self._manifests[name]), f"label {name}")
            if bad:
                left_out[name] = dict(sorted(bad.items()))
            ctm = self.dump_dir / name / "phones.ctm"
            if ctm.is_file():
                scores[name] = score_labels(labels, ctm, hop, self.options.num_clusters)
        result = {
            "source": self.options.features,
            "layer": self.options.layer,
            "rate_hz": 16000 / hop,
            "num_clusters": self.options.num_clusters,
            "fit_frames": int(_metadata(self.centroids)["fit_frames"]),
            "sets": scores,
            "left_out": left_out,
        }
        write_json(self.out_dir / "quality.json", result)
        shutil.rmtree(self.out_dir / PARTS, ignore_errors=True)
        return result


def _gather(
    source: FeatureSource,
    batches: Sequence[list[Utterance]],
    use: Callable[[Tensor], Any],
    num_threads: int,
    what: str,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what ``use`` makes of each utterance's frames, and of the bad ones why."""
    kept: dict[str, Any] = {}
    bad: dict[str, str] = {}
    for batch in extract(source, batches, use, num_threads, what):
        kept |= dict(batch.kept)
        bad |= batch.bad
    return kept, bad


def _keep(frames: Tensor) -> Tensor:
    return frames.to("cpu", torch.float32, copy=True)  # a view would keep its whole batch in memory


def _assign(frames: Tensor, centroids: Tensor) -> np.ndarray:
    return assign(frames, centroids).cpu().numpy().astype(np.uint16)


def _metadata(path: Path) -> Mapping[str, str]:
    return safe_open(path, "pt").metadata() or {}
