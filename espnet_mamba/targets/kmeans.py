"""Lloyd's k-means with k-means++ seeding, the same to the last bit for any number of shards.

Frames are cut into blocks of fixed size. A block's sums are always computed by the same operations and added in block
order, so how many threads share the blocks cannot change a centroid.
Letters: F frames, D feature width, K clusters.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BLOCK_FRAMES = 4096


def fit_kmeans(
    features: Tensor,
    num_clusters: int,
    seed: int = 0,
    num_iterations: int = 50,
    tolerance: float = 1e-4,
    num_shards: int = 1,
) -> Tensor:
    """Fit centroids by Lloyd's iterations; stop early when the mean squared distance falls by less than ``tolerance``.

    An empty cluster moves to the frame that is farthest from its own centroid.

    Args:
        features: ``(F, D)``, float32.
        num_clusters: K.
        seed: of the k-means++ draw.
        num_iterations: most iterations.
        tolerance: relative improvement below which fitting ends.
        num_shards: threads that share the blocks; does not change the result.

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
    if not torch.isfinite(features).all():
        raise ValueError("k-means: the features hold NaN or infinity; check the audio (stage 2) and the model")
    blocks = features.float().split(BLOCK_FRAMES)
    centroids = _plus_plus(features.float(), num_clusters, seed)
    previous = float("inf")
    with ThreadPoolExecutor(num_shards) as pool:
        for _ in range(num_iterations):
            parts = list(pool.map(lambda block, means=centroids: _block_sums(block, means), blocks))
            sums, counts = torch.zeros_like(centroids), torch.zeros(num_clusters)
            error = 0.0
            for block_sums, block_counts, distances in parts:
                sums += block_sums
                counts += block_counts
                error += distances.sum().item()
            centroids = sums / counts.clamp(min=1)[:, None]
            _refill_empty(centroids, counts, features, torch.cat([part[2] for part in parts]))
            if previous - error <= tolerance * previous and bool((counts > 0).all()):
                break
            previous = error
    return centroids


def assign(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of each frame: ``(F, D)``, ``(K, D)`` to ``(F,)``."""
    return _squared_distances(features.float(), centroids).argmin(1)


def _squared_distances(features: Tensor, centroids: Tensor) -> Tensor:
    """Return ``|c|^2 - 2 f.c``, the squared distance but for the frame's own norm ``(F, K)``."""
    return torch.addmm(centroids.square().sum(1), features, centroids.T, alpha=-2.0)


def _block_sums(block: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's sums ``(K, D)``, counts ``(K,)``, and each frame's squared distance ``(F,)``."""
    distances, labels = _squared_distances(block, centroids).min(1)
    sums = torch.zeros_like(centroids).index_add_(0, labels, block)
    counts = torch.bincount(labels, minlength=len(centroids)).float()
    return sums, counts, (distances + block.square().sum(1)).clamp(min=0)


def _refill_empty(centroids: Tensor, counts: Tensor, features: Tensor, distances: Tensor) -> None:
    empty = (counts == 0).nonzero().flatten()
    if len(empty):
        farthest = distances.argsort(descending=True, stable=True)[: len(empty)]
        centroids[empty] = features[farthest].float()


def _plus_plus(features: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Draw starting centroids, each with probability proportional to its squared distance from those drawn before
    (Arthur and Vassilvitskii 2007)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    distances = torch.full((len(features),), float("inf"))
    for _ in range(1, num_clusters):
        distances = torch.minimum(distances, (features - features[chosen[-1]]).square().sum(1))
        cumulative = distances.double().cumsum(0)
        point = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, point)), len(features) - 1))
    return features[chosen].clone()
