"""Judging audio before anything is trained on it: decode every sample, name every fault. S: samples at 16 kHz."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from espnet_mamba.data.audio import SAMPLE_RATE, AudioError, read_audio

FRAME_SAMPLES = 400
# 400 samples make one frame, but S3PRL wants ceil(S / 320) frames from every upstream and the front end gives
# (S - 400) // 320 + 1 of them: below 1040 samples (65 ms) the two differ by more than S3PRL accepts.
MIN_SAMPLES = 1040
# Decoded audio lies in [-1, 1]; float files may pass it a little, but 16-bit values written as floats reach 32768.
MAX_AMPLITUDE = 8.0


def check_audio(path: str, min_samples: int = MIN_SAMPLES) -> int:
    """Decode a whole file and return its number of samples S; AudioError names the first fault found in it."""
    samples = read_audio(path)
    if len(samples) < min_samples:
        limit = f"{min_samples} samples, {1000 * min_samples / SAMPLE_RATE:g} ms"
        raise AudioError(path, "too_short", f"{len(samples)} samples", limit, "leave it out or record it again")
    bad = int(np.count_nonzero(~np.isfinite(samples)))
    if bad:
        where = int(np.flatnonzero(~np.isfinite(samples))[0])
        value = f"{bad} NaN or Inf samples, the first at {where}"
        raise AudioError(path, "not_finite", value, "finite samples", "export the file again as 16-bit")
    if samples.min() == samples.max():
        value = f"every sample is {samples[0]:g}"
        raise AudioError(path, "silence", value, "a signal", "leave it out or record it again")
    peak = float(np.abs(samples).max())
    if peak > MAX_AMPLITUDE:
        value, remedy = f"amplitude {peak:g}", "divide by 32768 or export the file again as 16-bit"
        raise AudioError(path, "amplitude", value, f"{MAX_AMPLITUDE:g}, full scale is 1", remedy)
    return len(samples)


def check_many(paths: Mapping[str, str], nj: int = 1, min_samples: int = MIN_SAMPLES) -> dict[str, int | AudioError]:
    """Check utterance -> path with ``nj`` threads; return utterance -> samples or the fault, in the same order.

    Decoding leaves Python's lock, so threads are enough. Shows rate and ETA on stderr.
    """

    def judge(path: str) -> int | AudioError:
        try:
            return check_audio(path, min_samples)
        except AudioError as error:
            return error

    with ThreadPoolExecutor(max(1, nj)) as pool:
        results = pool.map(judge, paths.values())
        progress = tqdm(results, total=len(paths), desc="checking audio", unit="utt", mininterval=5)
        return dict(zip(paths, progress, strict=True))
