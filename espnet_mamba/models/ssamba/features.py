"""What SSAMBA sees: Kaldi's log-mel filterbanks, each utterance's from its own valid samples alone.

Letters: B utterances, S samples at 16 kHz, F frames of 10 ms.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torchaudio.compliance import kaldi

from espnet_mamba.models.ssamba.grid import num_patch_columns

WINDOW, HOP = 400, 160  # samples of a frame, and from frame to frame: 25 and 10 ms
MEAN, DEVIATION = -4.2677393, 4.5689974  # of AudioSet's filterbanks, as published


def num_fbank_frames(num_samples: int) -> int:
    """Return the frames of ``num_samples`` samples: windows stay inside the audio, so below 400 samples there are 0."""
    return max(0, (num_samples - WINDOW) // HOP + 1)


@torch.no_grad()
def fbank(wav: Tensor, num_mel_bins: int = 128) -> Tensor:
    """Return normalised log-mel energies ``(F, num_mel_bins)`` of ``wav (S,)`` in [-1, 1], in float32.

    ``(x + 4.2677393) / (2 * 4.5689974)``. Kaldi takes each frame's own mean off, so that a constant offset of the
    recording, which the published code removes first, changes nothing.
    """
    if len(wav) < WINDOW:
        return wav.new_zeros(0, num_mel_bins, dtype=torch.float32)
    with torch.autocast(wav.device.type, enabled=False):
        energies = kaldi.fbank(
            wav[None].float(),
            sample_frequency=16000.0,
            window_type="hanning",
            num_mel_bins=num_mel_bins,
            frame_shift=10.0,
            use_energy=False,
            htk_compat=True,
            dither=0.0,
        )
    return (energies - MEAN) / (2 * DEVIATION)


def batch_features(
    wavs: Tensor, num_samples: Tensor | None, num_mel_bins: int, frames_per_patch: int
) -> tuple[Tensor, list[int]]:
    """Compute a batch's filterbanks, filled up to whole patches.

    Args:
        wavs: ``(B, S)``; what stands behind an utterance's end is not read.
        num_samples: valid samples ``(B,)``; None when every row is full.
        num_mel_bins: energies per frame.
        frames_per_patch: a last patch that is not full is filled up with 0, the mean.

    Returns:
        ``(B, num_mel_bins, F)`` with F a multiple of ``frames_per_patch``, and each utterance's columns of patches; an
        utterance shorter than a frame has none, which is said once.
    """
    lengths = [wavs.shape[1]] * len(wavs) if num_samples is None else num_samples.tolist()
    rows = [fbank(wav[:length], num_mel_bins) for wav, length in zip(wavs, lengths, strict=True)]
    columns = [num_patch_columns(len(row), frames_per_patch) for row in rows]
    if 0 in columns:
        _warn_short()
    features = wavs.new_zeros(len(wavs), num_mel_bins, max(columns) * frames_per_patch, dtype=torch.float32)
    for index, row in enumerate(rows):
        features[index, :, : len(row)] = row.T
    return features, columns


@cache
def _warn_short() -> None:
    logging.warning(f"an utterance is shorter than one frame ({WINDOW} samples, 25 ms) and gets no patches")
