"""How well clusters tell phones apart: phone purity, cluster purity, PNMI (Hsu et al. 2021; docs/papers.md 7).

P phones, K clusters, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class ClusterQuality(NamedTuple):
    """Fractions between 0 and 1, and what they were counted on."""

    purity: float  # E_z max_y P(y | z)
    cluster_purity: float  # E_y max_z P(z | y)
    pnmi: float  # I(y; z) / H(y)
    used_clusters: int
    num_frames: int


class JointCounts:
    """Counts frames by phone and cluster, utterance by utterance, so that a corpus of any size can be scored."""

    def __init__(self, num_clusters: int) -> None:
        self.num_clusters = num_clusters
        self.phones: dict[str, int] = {}  # name -> row
        self._counts = np.zeros((64, num_clusters), dtype=np.int64)

    def add(self, phones: Sequence[str], clusters: np.ndarray) -> None:
        """Count an utterance's frames: the phone of each, and ``clusters (F,)``."""
        rows = np.array([self.phones.setdefault(name, len(self.phones)) for name in phones], dtype=np.int64)
        while len(self.phones) > len(self._counts):
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        np.add.at(self._counts, (rows, clusters), 1)

    def counts(self, without: str | None = None) -> np.ndarray:
        """Return counts ``(P, K)``, with the row of the phone ``without`` left out."""
        keep = [row for name, row in self.phones.items() if name != without]
        return self._counts[keep]


def cluster_quality(phones: np.ndarray, clusters: np.ndarray, num_clusters: int) -> ClusterQuality:
    """Score clusters against phones over time-aligned frames.

    Args:
        phones: phone number of each frame ``(F,)``.
        clusters: cluster number of each frame ``(F,)``, below ``num_clusters``.
        num_clusters: K.

    Raises:
        ValueError: no frames, different lengths, or a cluster number out of range.
    """
    if len(phones) != len(clusters) or len(phones) == 0:
        raise ValueError(f"purity needs as many phones as clusters, and some: got {len(phones)} and {len(clusters)}")
    if clusters.min() < 0 or clusters.max() >= num_clusters:
        span = f"{clusters.min()} to {clusters.max()}"
        raise ValueError(f"purity: clusters run from {span}, expected 0..{num_clusters - 1}")
    counts = np.zeros((int(phones.max()) + 1, num_clusters), dtype=np.int64)
    np.add.at(counts, (phones, clusters), 1)
    return quality_of_counts(counts)


def quality_of_counts(counts: np.ndarray) -> ClusterQuality:
    """Score counts of frames by phone and cluster ``(P, K)``.

    Raises:
        ValueError: no frames.
    """
    total = int(counts.sum())
    if total == 0:
        raise ValueError("purity needs frames with phones, and there are none; are the alignments of these utterances?")
    joint = counts / total
    phone, cluster = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    seen = joint > 0
    information = float((joint[seen] * np.log(joint[seen] / (phone * cluster)[seen])).sum())
    entropy = float(-(phone[phone > 0] * np.log(phone[phone > 0])).sum())
    return ClusterQuality(
        purity=float(joint.max(0).sum()),
        cluster_purity=float(joint.max(1).sum()),
        pnmi=information / entropy if entropy > 0 else 0.0,
        used_clusters=int((counts.sum(0) > 0).sum()),
        num_frames=total,
    )
