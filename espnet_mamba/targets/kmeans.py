"""k-means: Lloyd's iterations on growing parts of the frames, the same to the last bit for any number of threads.

Frames are cut into blocks of fixed size. One thread computes a block's sums, always by the same operations, and they
are added in block order, so how many threads share the blocks cannot change a centroid.
Letters: F frames, D feature width, K clusters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.targets.seeding import choose_seeds
from espnet_mamba.targets.threads import Threads, one_thread_each

BLOCK_FRAMES = 1024
SEEDING_FRAMES, MOST_SEEDING_FRAMES = 24, 12_288  # per cluster, that starting centroids are chosen from; in all
GROWTH = 4  # from one part of the frames to the next
PART_ITERATIONS, PART_TOLERANCE = 10, 3e-3  # on each part but the last, which is all frames


def fit_kmeans(
    features: Tensor,
    num_clusters: int,
    seed: int = 0,
    num_iterations: int = 50,
    tolerance: float = 1e-4,
    num_threads: int | None = None,
) -> Tensor:
    """Fit centroids; stop early when the mean squared distance falls by less than ``tolerance``.

    Starting centroids are chosen from a few frames (``seeding.py``), moved by Lloyd's iterations on random parts of
    the frames, each four times the one before, and at last on all frames: the early moves, which are large, need few.
    An empty cluster moves to the frame that is farthest from its own centroid.

    Args:
        features: ``(F, D)``, float32.
        num_clusters: K.
        seed: of the parts and of the k-means++ draw.
        num_iterations: most iterations on all frames.
        tolerance: relative improvement below which fitting ends.
        num_threads: that share the blocks, None for as many as PyTorch uses; does not change the result.

    Returns:
        Centroids ``(K, D)``, float32.

    Raises:
        ValueError: K is not in 1..F, or a feature is not finite.
    """
    if not 1 <= num_clusters <= len(features):
        raise ValueError(
            f"k-means: {num_clusters} clusters need at least as many frames, there are {len(features)}; "
            "choose fewer clusters or more audio"
        )
    features = features.float()
    with one_thread_each(num_threads) as threads:
        frames = _Frames(features, None, threads)
        if not torch.isfinite(frames.norms).all():
            raise ValueError("k-means: the features hold NaN or infinity; check the audio (stage 2) and the model")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator)
        size = min(len(features), max(num_clusters, min(SEEDING_FRAMES * num_clusters, MOST_SEEDING_FRAMES)))
        centroids = choose_seeds(features[order[:size]], num_clusters, generator, threads)
        while size < len(features):
            part = _Frames(features, order[:size].sort().values, threads)
            centroids = _lloyd(part, centroids, PART_ITERATIONS, PART_TOLERANCE, threads)
            size *= GROWTH
        return _lloyd(frames, centroids, num_iterations, tolerance, threads)


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each frame: ``(F, D)``, ``(K, D)`` to ``(F,)``; the first of equally near ones."""
    offsets = centroids.square().sum(1)
    if features.is_cuda:
        return torch.addmm(offsets, features.float(), centroids.T, alpha=-2.0).argmin(1)
    parts = [_offset_distances(block, centroids, offsets).argmin(1) for block in features.float().split(BLOCK_FRAMES)]
    return torch.from_numpy(np.concatenate(parts))


class _Frames:
    """``features[rows]``, or all of them, in blocks that are gathered when they are asked for, and ``|f|^2 (F,)``."""

    def __init__(self, features: Tensor, rows: Tensor | None, threads: Threads) -> None:
        self.features, self.rows = features, rows
        self.size = len(features if rows is None else rows)
        self.starts = range(0, self.size, BLOCK_FRAMES)
        self.norms = torch.cat(list(threads.map(lambda start: self.block(start).square().sum(1), self.starts)))

    def block(self, start: int) -> Tensor:
        """Return the block that begins at frame ``start``."""
        span = slice(start, start + BLOCK_FRAMES)
        return self.features[span] if self.rows is None else self.features[self.rows[span]]

    def pick(self, frames: Tensor) -> Tensor:
        """Return some frames by their numbers."""
        return self.features[frames if self.rows is None else self.rows[frames]]


def _offset_distances(block: Tensor, centroids: Tensor, offsets: Tensor) -> np.ndarray:
    """Return ``|c|^2 - 2 f.c``, the squared distance but for the frame's own norm ``(F, K)``.

    As a NumPy array, whose argmin is several times faster than PyTorch's.
    """
    return torch.addmm(offsets, block, centroids.T, alpha=-2.0).numpy()


def _lloyd(frames: _Frames, centroids: Tensor, num_iterations: int, tolerance: float, threads: Threads) -> Tensor:
    previous = math.inf
    for _ in range(num_iterations):
        offsets = centroids.square().sum(1)

        def block_sums(start: int, centroids: Tensor = centroids, offsets: Tensor = offsets) -> tuple[Tensor, ...]:
            return _block_sums(frames.block(start), centroids, offsets)

        sums, counts = torch.zeros_like(centroids), torch.zeros(len(centroids))
        distances = []
        for part_sums, part_counts, part_distances in threads.map(block_sums, frames.starts):
            sums += part_sums
            counts += part_counts
            distances.append(part_distances)
        nearest = (torch.cat(distances) + frames.norms).clamp(min=0)
        error = nearest.sum(dtype=torch.float64).item()
        centroids = sums / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero().flatten()
        if len(empty):
            centroids[empty] = frames.pick(nearest.argsort(descending=True, stable=True)[: len(empty)])
        elif error >= (1.0 - tolerance) * previous:  # never in the first, where previous is infinite
            break
        previous = error
    return centroids


def _block_sums(block: Tensor, centroids: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sums ``(K, D)`` and counts ``(K,)`` of a block, and each frame's squared distance but for its norm."""
    table = _offset_distances(block, centroids, offsets)
    nearest = table.argmin(1)
    labels = torch.from_numpy(nearest)
    sums = torch.zeros_like(centroids).index_add_(0, labels, block)
    counts = torch.bincount(labels, minlength=len(centroids)).float()
    return sums, counts, torch.from_numpy(table[np.arange(len(table)), nearest])
