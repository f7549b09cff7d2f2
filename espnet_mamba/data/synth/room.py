"""From espeak's dry 22.05 kHz to a recording at 16 kHz: pauses around it, a level, a little noise."""

from __future__ import annotations

import numpy as np
from scipy.signal import lfilter, resample_poly

from espnet_mamba.data.alignment import SILENCE
from espnet_mamba.data.audio import SAMPLE_RATE
from espnet_mamba.data.synth.phones import Phone, phone_segments
from espnet_mamba.data.synth.speaker import Speech
from espnet_mamba.data.synth.words import NO_WORD

# 1 ms: lengths and phone times are whole multiples of it, so that phones.ctm is exact to its last digit.
TICK = SAMPLE_RATE // 1000
LEAD_MS, TRAIL_MS = (80, 300), (60, 250)
LEVEL_DB, SNR_DB = (-28.0, -20.0), (20.0, 35.0)
LARGEST_PEAK = 0.95


def record(speech: Speech, rng: np.random.Generator) -> tuple[np.ndarray, list[Phone]]:
    """Return int16 samples (S,) at 16 kHz and the phones that cover them, the first and the last ``sil``."""
    lead, trail = (int(rng.integers(low, high)) * TICK for low, high in (LEAD_MS, TRAIL_MS))
    # Polyphase filtering has no delay: a time in seconds means the same before and after.
    clean = resample_poly(speech.samples.astype(np.float64) / 32768, SAMPLE_RATE // 50, speech.rate // 50)
    trail += -(lead + len(clean) + trail) % TICK
    level = 10 ** (rng.uniform(*LEVEL_DB) / 20)
    clean *= min(level / _rms(clean), LARGEST_PEAK / np.abs(clean).max())
    noise_level = _rms(clean) * 10 ** (-rng.uniform(*SNR_DB) / 20)
    padded = np.concatenate([np.zeros(lead), clean, np.zeros(trail)])
    samples = padded + noise_level * _noise(len(padded), rng)
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16), _shift(speech, lead, len(padded))


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2)))


def _noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Return noise (S,) of RMS 1 that falls by 6 dB an octave above about 500 Hz, as in quiet rooms."""
    noise = lfilter([1.0], [1.0, -0.8], rng.standard_normal(length))
    return noise / _rms(noise)


def _shift(speech: Speech, lead: int, length: int) -> list[Phone]:
    """Return the phones of ``speech`` moved by ``lead`` samples, in whole ms, stretched at both ends to ``length``."""
    inner = phone_segments(speech)
    if inner[0].label == SILENCE:
        inner = inner[1:]
    if inner[-1].label == SILENCE:
        inner = inner[:-1]
    starts = [0.0, *(round(segment.start + lead / SAMPLE_RATE, 3) for segment in inner)]
    starts.append(round(inner[-1].end + lead / SAMPLE_RATE, 3))
    ends = [*starts[1:], length / SAMPLE_RATE]
    labels = [SILENCE, *(segment.label for segment in inner), SILENCE]
    words = [NO_WORD, *(segment.word for segment in inner), NO_WORD]
    return [Phone(*row) for row in zip(starts, ends, labels, words, strict=True) if row[1] > row[0]]
