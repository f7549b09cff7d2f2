"""One layer of a corpus, or of a shard of it, batch by batch; recordings that cannot be used are named and left out.

An utterance's features depend, at rounding level, on the utterances that share its padded batch and on the number of
threads that share a matrix product. So batches are cut from the whole corpus and a shard takes whole batches, and a
batch is computed by one thread: labels are the same to the last bit for any number of shards and threads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from espnet_mamba.data.audio import AudioError, read_audio
from espnet_mamba.data.manifest import Utterance
from espnet_mamba.targets.features import FeatureSource, features_of
from espnet_mamba.targets.threads import one_thread_each

LINE_SECONDS = 20.0  # between lines of progress where there is no terminal
MAX_BAD_SHARE = 0.1  # more are not bad files but a wrong folder or a lost disk


class Extracted(NamedTuple):
    """What was made of one batch, and why some of it could not be used."""

    kept: list[tuple[str, Any]]  # utterance id, what ``use`` returned
    bad: dict[str, str]  # utterance id -> reason


def extract(
    source: FeatureSource,
    batches: Sequence[Sequence[Utterance]],
    use: Callable[[Tensor], Any],
    num_threads: int,
    label: str,
) -> Iterator[Extracted]:
    """Yield ``use(frames (T, D))`` of the source's first layer for each utterance, batch by batch, in order.

    On the CPU ``num_threads`` threads each compute batches of their own; beside a GPU they read audio ahead of it.
    ``label`` stands before progress: audio done, rate, and time left.

    Raises:
        ValueError: more than a tenth of the utterances are bad.
    """

    def compute(read: tuple[list[tuple[Utterance, Tensor]], dict[str, str]]) -> Extracted:
        return _use_batch(source, use, *read)

    def read_and_compute(batch: Sequence[Utterance]) -> Extracted:
        return compute(_read_batch(batch))

    on_cpu = str(getattr(source, "device", "cpu")).startswith("cpu")
    progress = _Progress(label, sum(utterance.num_samples for batch in batches for utterance in batch))
    bad: dict[str, str] = {}
    with one_thread_each(num_threads) as threads:
        read = threads.map(read_and_compute if on_cpu else _read_batch, batches)
        for batch, result in zip(batches, read if on_cpu else map(compute, read), strict=True):
            bad |= result.bad
            yield result
            progress.add(sum(utterance.num_samples for utterance in batch))
    progress.end()
    refuse_many(bad, sum(len(batch) for batch in batches), label)


def refuse_many(bad: dict[str, str], total: int, label: str) -> None:
    """Raise a ValueError when more than a tenth of ``total`` utterances, and more than one, are bad."""
    if len(bad) > max(1.0, MAX_BAD_SHARE * total):
        first = next(iter(bad))
        raise ValueError(
            f"{label}: {len(bad)} of {total} utterances cannot be used (limit {MAX_BAD_SHARE:.0%}), the first is "
            f"{first}: {bad[first]}; see to the disk, or run stage 2 (check) again"
        )


def _read_batch(batch: Sequence[Utterance]) -> tuple[list[tuple[Utterance, Tensor]], dict[str, str]]:
    good, bad = [], {}
    for utterance in batch:
        try:
            good.append((utterance, torch.from_numpy(read_audio(utterance.path))))
        except AudioError as error:
            bad[utterance.utt_id] = str(error)
    return good, bad


def _use_batch(
    source: FeatureSource, use: Callable[[Tensor], Any], good: list[tuple[Utterance, Tensor]], bad: dict[str, str]
) -> Extracted:
    kept = []
    found = features_of(source, [wav for _, wav in good]) if good else []
    for (utterance, _), layers in zip(good, found, strict=True):
        if torch.isfinite(layers[0]).all():
            kept.append((utterance.utt_id, use(layers[0])))
        else:
            bad[utterance.utt_id] = f"{utterance.path}: its features hold NaN or infinity; check the recording"
    return Extracted(kept, bad)


class _Progress:
    """A bar on a terminal, else a line now and then: hours of audio done, times real time, time left."""

    def __init__(self, label: str, total_samples: int) -> None:
        self.label, self.total, self.done = label, max(1, total_samples) / 16000, 0.0
        self.started = self.shown = time.monotonic()
        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f} of {total:.2f} h [{elapsed}<{remaining}, {rate_fmt}]"
        self.bar = tqdm(total=self.total / 3600, desc=label, unit="h", disable=not sys.stderr.isatty(), bar_format=form)

    def add(self, samples: int) -> None:
        """Count what is done, and say so when it is time."""
        self.done += samples / 16000
        self.bar.update(samples / 16000 / 3600)
        now = time.monotonic()
        if self.bar.disable and now - self.shown >= LINE_SECONDS:
            self.shown = now
            left = (now - self.started) * (self.total - self.done) / max(self.done, 1e-9)
            print(f"{self._line(now)}, {tqdm.format_interval(left)} left", flush=True)

    def end(self) -> None:
        """Say what it took."""
        self.bar.close()
        now = time.monotonic()
        print(f"{self._line(now)}, in {tqdm.format_interval(now - self.started)}", flush=True)

    def _line(self, now: float) -> str:
        rate = self.done / max(now - self.started, 1e-9)
        return f"{self.label}: {self.done / 3600:.2f} of {self.total / 3600:.2f} h, {rate:.0f} times real time"
