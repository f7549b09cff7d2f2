"""From phone times to one label per frame. Frames: hop 320 samples, frame t centred on sample 320*t + 200."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from espnet_mamba.data.kaldi import Segment

SILENCE = "sil"


def frame_labels(
    segments: Sequence[Segment], num_frames: int, hop: int = 320, offset: int = 200, sample_rate: int = 16000
) -> list[str]:
    """Return for each of ``num_frames`` frames the label at its centre, sample ``hop * t + offset``.

    A segment holds its start and not its end; gaps and what lies beyond the last segment are ``sil``.
    """
    ordered = sorted(segments, key=lambda segment: segment.start)
    # Whole samples: 0.1 s * 16000 must not fall a hair before a centre because of floating point.
    starts = [round(segment.start * sample_rate) for segment in ordered]
    ends = [round(segment.end * sample_rate) for segment in ordered]
    labels = []
    for frame in range(num_frames):
        centre = hop * frame + offset
        index = bisect_right(starts, centre) - 1
        labels.append(ordered[index].label if index >= 0 and centre < ends[index] else SILENCE)
    return labels
