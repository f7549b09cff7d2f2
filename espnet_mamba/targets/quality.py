"""How well clusters tell phones apart: phone purity, cluster purity, PNMI (Hsu et al. 2021; docs/papers.md 7)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ClusterQuality(NamedTuple):
    """Fractions between 0 and 1, and what they were counted on."""

    purity: float  # E_z max_y P(y | z)
    cluster_purity: float  # E_y max_z P(z | y)
    pnmi: float  # I(y; z) / H(y)
    used_clusters: int
    num_frames: int


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
    joint = np.zeros((int(phones.max()) + 1, num_clusters))
    np.add.at(joint, (phones, clusters), 1.0)
    used = int((joint.sum(0) > 0).sum())
    joint /= len(phones)
    phone, cluster = joint.sum(1, keepdims=True), joint.sum(0, keepdims=True)
    seen = joint > 0
    information = float((joint[seen] * np.log(joint[seen] / (phone * cluster)[seen])).sum())
    entropy = float(-(phone[phone > 0] * np.log(phone[phone > 0])).sum())
    return ClusterQuality(
        purity=float(joint.max(0).sum()),
        cluster_purity=float(joint.max(1).sum()),
        pnmi=information / entropy if entropy > 0 else 0.0,
        used_clusters=used,
        num_frames=len(phones),
    )
