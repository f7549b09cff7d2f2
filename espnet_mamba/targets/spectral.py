"""Spectral features on the front end's frame grid: Kaldi-style MFCC with deltas, and log-mel filterbanks.

Letters: S samples at 16 kHz, T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchaudio.compliance import kaldi
from torchaudio.functional import compute_deltas

NUM_CEPSTRA = 13
NUM_MELS = 80


def mfcc(wav: Tensor) -> Tensor:
    """Return 13 MFCC without energy, deltas and second deltas at 100 Hz (docs/papers.md 5): ``(S,)`` to ``(T, 39)``.

    Windows of 25 ms start every 10 ms and stay inside the audio, ``T = (S - 400) // 160 + 1``, so that every second
    one is a frame of the convolutional front end.
    """
    cepstra = kaldi.mfcc(wav[None] * 32768.0, num_ceps=NUM_CEPSTRA, use_energy=False, dither=0.0).T  # (13, T)
    deltas = compute_deltas(cepstra)
    return torch.cat([cepstra, deltas, compute_deltas(deltas)]).T.contiguous()


def log_mel(wav: Tensor) -> Tensor:
    """Return 80 log-mel energies at 50 Hz: ``(S,)`` to ``(T, 80)``, ``T = (S - 400) // 320 + 1``."""
    return kaldi.fbank(wav[None] * 32768.0, num_mel_bins=NUM_MELS, frame_shift=20.0, dither=0.0)
