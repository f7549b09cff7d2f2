"""Judging audio before anything is trained on it: decode every sample, name every fault. S: samples at 16 kHz."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from espnet_mamba.data.audio import SAMPLE_RATE, AudioError, decode_audio, read_bytes
from espnet_mamba.data.check_journal import AudioFacts, CheckJournal, Stamp
from espnet_mamba.data.tar_shards import parse_member

FRAME_SAMPLES = 400
# 400 samples make one frame, but S3PRL wants ceil(S / 320) frames from every upstream and the front end gives
# (S - 400) // 320 + 1 of them: below 1040 samples (65 ms) the two differ by more than S3PRL accepts.
MIN_SAMPLES = 1040
# Decoded audio lies in [-1, 1]; float files may pass it a little, but 16-bit values written as floats reach 32768.
MAX_AMPLITUDE = 8.0


def check_audio(path: str, min_samples: int = MIN_SAMPLES) -> int:
    """Decode a whole recording and return its number of samples S; AudioError names the first fault found in it."""
    return examine_audio(path, min_samples).samples


def digest_of(data: bytes) -> str:
    """Return the digest that the manifest holds of a file: BLAKE2b of 128 bits, as ``b2sum -l 128`` prints it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def examine_audio(path: str, min_samples: int = MIN_SAMPLES) -> AudioFacts:
    """Do the same and return all that the manifest holds."""
    data = read_bytes(path)
    samples = decode_audio(data, path)
    _check_samples(path, samples, min_samples)
    return AudioFacts(len(samples), len(data), digest_of(data))


def _check_samples(path: str, samples: np.ndarray, min_samples: int) -> None:
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


def check_many(
    paths: Mapping[str, str], nj: int = 1, min_samples: int = MIN_SAMPLES, journal: CheckJournal | None = None
) -> dict[str, AudioFacts | AudioError]:
    """Check utterance -> location with ``nj`` threads; return utterance -> facts or the fault, in the same order.

    Decoding leaves Python's lock, so threads are enough. Shows rate and ETA on stderr. What ``journal`` knows is not
    decoded again.
    """
    journal = journal or CheckJournal(None, min_samples)

    def judge(path: str) -> tuple[Stamp, AudioFacts | AudioError, bool]:
        stamp = _stamp(path)
        known = journal.find(path, stamp)
        if known is not None:
            return stamp, known, True
        try:
            return stamp, examine_audio(path, min_samples), False
        except AudioError as error:
            return stamp, error, False

    verdicts: dict[str, AudioFacts | AudioError] = {}
    reused = 0
    with ThreadPoolExecutor(max(1, nj)) as pool:
        results = in_order(pool, judge, paths.values(), ahead=8 * max(1, nj))
        progress = tqdm(results, total=len(paths), desc="checking audio", unit="utt", mininterval=5)
        for (utt_id, path), (stamp, verdict, known) in zip(paths.items(), progress, strict=True):
            verdicts[utt_id] = verdict
            reused += known
            if not known:
                journal.add(path, stamp, verdict)
    if reused:
        print(f"{reused} of {len(paths)} recordings were checked by an earlier start of this command")
    return verdicts


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable[Any], ahead: int
) -> Iterator[Any]:
    """Yield ``function`` of each item, in order; at most ``ahead`` at a time wait, where ``map`` would queue all."""
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _stamp(location: str) -> Stamp:
    """Return size and time of the file that a location is in, [] where it cannot be looked at."""
    member = parse_member(location)
    try:
        stat = os.stat(member.shard if member else location)
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]
