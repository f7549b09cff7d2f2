"""From phone times to one label per frame. Frames: hop 320 samples, frame t centred on sample 320*t + 200."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from espnet_mamba.data.kaldi import Segment

SILENCE = "sil"
SLACK = 0.1  # seconds that an alignment may go past the audio: aligners round, and drop the last partial frame


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


def require_inside(
    utt_id: str, segments: Sequence[Segment], num_frames: int, where: str, hop: int = 320, offset: int = 200
) -> None:
    """Raise a ValueError that names file, utterance and label when a segment ends later than its audio can.

    ``num_frames`` frames leave room for at most ``hop * num_frames + 2 * offset`` samples of 16 kHz, and SLACK more.
    """
    audio = (hop * num_frames + 2 * offset) / 16000
    for segment in segments:
        if segment.end > audio + SLACK:
            raise ValueError(
                f"{where}: {utt_id}: {segment.label!r} ends at {segment.end:.2f} s, the audio at {audio:.2f} s; "
                "correct the times"
            )
