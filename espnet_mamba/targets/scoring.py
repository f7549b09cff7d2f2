"""Scores label files against phone alignments."""

from __future__ import annotations

from pathlib import Path

from espnet_mamba.data.alignment import SILENCE, frame_labels
from espnet_mamba.data.kaldi import read_ctm
from espnet_mamba.targets.labels import FrameLabels
from espnet_mamba.targets.quality import JointCounts, quality_of_counts


def score_labels(labels: Path, ctm: Path, hop: int, num_clusters: int) -> dict[str, dict[str, float]]:
    """Score all frames, and those that are not silence: silence dominates and hides differences.

    Utterances without labels or without phones are left out. ``hop`` is in samples at 16 kHz.

    Raises:
        ValueError: no utterance has both.
    """
    found, segments = FrameLabels(labels), read_ctm(ctm)
    counted = JointCounts(num_clusters)
    for utt_id in found:
        if utt_id in segments:
            clusters = found[utt_id]
            counted.add(frame_labels(segments[utt_id], len(clusters), hop=hop), clusters)
    kinds = {"all": counted.counts(), "no_silence": counted.counts(without=SILENCE)}
    try:
        return {kind: quality_of_counts(counts)._asdict() for kind, counts in kinds.items()}
    except ValueError as error:
        raise ValueError(f"{ctm} and {labels}: {error}") from error
