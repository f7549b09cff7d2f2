"""Starting centroids: greedy k-means++, then swaps that lower the distance, on a table of all distances between frames.

The table is one matrix product, a fraction of the time of as many thin ones as k-means++ has steps; a step or a swap is
then a look at a few of its rows. Lloyd's iterations cannot move a centroid from where there are too many to where there
are too few; the swaps do. n frames, K clusters, D feature width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from espnet_mamba.targets.threads import Threads

BLOCK_FRAMES = 1024
SWAP_TRIES = 6  # per cluster
MOST_CLUSTERS = 4096  # above, they are frames drawn at random: there are too few to choose among


def choose_seeds(frames: Tensor, num_clusters: int, generator: torch.Generator, threads: Threads) -> Tensor:
    """Return K of the frames ``(n, D)``, which come in random order: ``(K, D)``."""
    if num_clusters > MOST_CLUSTERS:
        return frames[:num_clusters].clone()
    norms = frames.square().sum(1)

    def rows(block: Tensor) -> Tensor:
        return (torch.addmm(norms, block, frames.T, alpha=-2.0) + block.square().sum(1)[:, None]).clamp_(min=0)

    table = torch.cat(list(threads.map(rows, frames.split(BLOCK_FRAMES)))).numpy()
    chosen = plus_plus(table, num_clusters, generator)
    return frames[swap(table, chosen, SWAP_TRIES * num_clusters, generator)].clone()


def plus_plus(table: np.ndarray, num_clusters: int, generator: torch.Generator) -> list[int]:
    """Choose frames, each with probability proportional to its squared distance from those chosen before (Arthur and
    Vassilvitskii 2007), the best of a few draws; ``table (n, n)`` holds squared distances."""
    points = _uniform((num_clusters, 2 + int(math.log(num_clusters))), generator)
    chosen, closest = [0], table[0]
    for step in range(1, num_clusters):
        drawn = _draw(closest, points[step])
        left = np.minimum(table[drawn], closest)
        best = left.sum(1, dtype=np.float64).argmin()
        chosen.append(int(drawn[best]))
        closest = left[best]
    return chosen


def swap(table: np.ndarray, chosen: list[int], tries: int, generator: torch.Generator) -> list[int]:
    """Draw frames as k-means++ does, and let one take the place of the chosen frame that is needed least wherever that
    lowers the sum of distances (Lattanzi and Sohler 2019)."""
    chosen, points = list(chosen), _uniform((tries,), generator)
    distances = table[chosen]  # (K, n)
    first, nearest, second = _two_nearest(distances)
    for point in points:
        drawn = int(_draw(nearest, point))
        new = table[drawn]
        left = np.minimum(nearest, new)
        loss = np.bincount(first, np.minimum(second, new) - left, len(chosen))  # of letting each chosen one go
        out = int(loss.argmin())
        if left.sum(dtype=np.float64) + loss[out] < nearest.sum(dtype=np.float64):
            touched = np.flatnonzero((distances[out] <= second) | (new < second))
            chosen[out], distances[out] = drawn, new
            first[touched], nearest[touched], second[touched] = _two_nearest(distances[:, touched])
    return chosen


def _two_nearest(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each frame's nearest of K, its distance, and that of the next nearest: ``(K, n)`` to three of ``(n,)``."""
    columns, others = np.arange(distances.shape[1]), distances.copy()
    first = distances.argmin(0)
    others[first, columns] = np.inf
    return first, distances[first, columns], others.min(0)


def _draw(weights: np.ndarray, points: np.ndarray) -> np.ndarray:
    cumulative = weights.cumsum(dtype=np.float64)
    return np.searchsorted(cumulative, points * cumulative[-1], side="right").clip(max=len(weights) - 1)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> np.ndarray:
    return torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
