"""Batches by number: batch i of a run is a pure function of (seed, i), so that resuming is arithmetic."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess as Process
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from espnet_mamba.train.batch_reader import BatchReader, Loaded, Request, as_it_is
from espnet_mamba.train.signals import ignore_in_worker
from espnet_mamba.train.unreadable import Unreadable

_READING = "being read:"


class BatchRow(Protocol):
    """An endless row of batches that repeats the corpus in passes of ``len`` batches."""

    def __len__(self) -> int: ...

    def batch(self, number: int) -> Sequence[str]:
        """Return the utterance ids of a batch, counted from 0."""

    @property
    def batches(self) -> Sequence[Sequence[str]]:
        """Batches among which the largest one is."""


class FixedBatches:
    """The same batches in every pass, each pass in an order of its own; the last one asked for is remembered."""

    def __init__(self, batches: Sequence[Sequence[str]], seed: int, shuffle: bool) -> None:
        self.batches, self.seed, self.shuffle = list(batches), seed, shuffle
        self._pass: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.batches)

    def batch(self, number: int) -> Sequence[str]:
        """Return the utterance ids of a batch, counted from 0."""
        number, position = divmod(number, len(self.batches))
        if self.shuffle:
            if self._pass is None or self._pass[0] != number:
                order = np.random.default_rng([self.seed, number]).permutation(len(self.batches))
                self._pass = (number, order)
            position = int(self._pass[1][position])
        return self.batches[position]


class _Sampler:
    """A DataLoader's batch sampler, which it asks anew in each epoch."""

    def __init__(self, requests: Callable[[], Iterator[Request]]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[Request]:
        return self.requests()


class StepIterFactory(AbsIterFactory):
    """Iterates a row of batches; ESPnet's ``num_iters_per_epoch`` cuts it into epochs of equal size.

    ``turns`` is (rank, processes) where batches are taken in turns: iteration i of process r takes number
    ``i * processes + r``, so that the row is the same for any number of processes. None: each takes its part of each.
    The processes that read audio live as long as this factory does; they are sent (number, epoch, utterances).
    """

    batches_per_iter = 1  # of the row, taken by all processes together

    def __init__(
        self,
        dataset: Dataset,
        row: BatchRow,
        collate: Any,
        train: bool,
        num_iters_per_epoch: int | None,
        num_workers: int,
        pin_memory: bool,
        turns: tuple[int, int] | None = None,
        unreadable: Unreadable | None = None,
        set_name: str = "",
    ) -> None:
        self.dataset, self.row, self.collate, self.shuffle, self.turns = dataset, row, collate, train, turns
        self.unreadable = unreadable or Unreadable(None, len(row), 0.0)
        own = len(row)
        if turns:
            rank, self.batches_per_iter = turns
            # in training all processes need the same number, in validation each batch counts once
            own = -(-own // turns[1]) if train else len(range(rank, own, turns[1]))
        self.iters_per_epoch = num_iters_per_epoch or own
        self.reader = BatchReader(dataset, collate, set_name, num_workers, self.unreadable.seen)
        self._indices: Sequence[int] = ()
        self._epoch = 0
        self._asked: deque[Request] = deque()
        self._loader = DataLoader(
            self.reader,
            batch_sampler=_Sampler(self._ask),
            collate_fn=as_it_is,
            worker_init_fn=ignore_in_worker,
            num_workers=num_workers,
            persistent_workers=train and num_workers > 0,  # those of validation would hold memory for hours
            pin_memory=pin_memory,
        )

    def batch(self, index: int) -> Sequence[str]:
        """Return the utterance ids of this process's batch ``index`` of the run, counted from 0."""
        if self.turns:
            rank, processes = self.turns
            index = index * processes + rank
        return self.row.batch(index)

    @property
    def batches(self) -> Sequence[Sequence[str]]:
        """Batches of this process, among which its largest one is."""
        return self.row.batches

    def build_iter(self, epoch: int, shuffle: bool | None = None, skip: int = 0) -> Iterator[Any]:
        """Iterate epoch ``epoch`` (from 1), without its first ``skip`` batches.

        Yields:
            Utterance ids and their batch. Utterances that cannot be read are not among them.

        Raises:
            ValueError: too many of them, or labels that are not there; RuntimeError: a worker died.
        """
        first = (epoch - 1) * self.iters_per_epoch if self.shuffle else 0
        self._indices, self._epoch = range(first + skip, first + self.iters_per_epoch), epoch
        self._asked.clear()
        loaded = iter(self._loader)  # started now: workers read on while the caller gets ready
        _end_at_exit(getattr(loaded, "_workers", ()))
        return self._results(loaded)

    def told_of_worker(self, error: RuntimeError) -> str | None:
        """Return what to say of an error by which PyTorch tells of a dead worker in the midst of a step, else None.

        A signal's handler raises it, wherever the program happens to be.
        """
        said = str(error)
        return self._what_died(error) if "DataLoader worker" in said and _READING not in said else None

    def close(self) -> None:
        """End the processes that read audio: they ignore the signal by which Python would end them when it exits."""
        iterator, self._loader._iterator = self._loader._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()

    def _ask(self) -> Iterator[Request]:
        for index in self._indices:
            utt_ids = self.batch(index)
            # a batch of training must not be left out: processes would no longer be at the same step
            request = Request(index, self._epoch, utt_ids, self.batch(index + 1) if self.shuffle else ())
            self._asked.append(request)
            yield request

    def _results(self, loaded: Iterator[Loaded]) -> Iterator[tuple[list[str], dict[str, Tensor]]]:
        while True:
            try:
                utt_ids, batch, bad, error = next(loaded)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError) as died:  # the latter when a tensor is on its way
                raise RuntimeError(self._what_died(died)) from died
            request = self._asked.popleft()
            self.unreadable.add(bad)
            if error:
                raise ValueError(error)
            if batch is not None:
                yield utt_ids, batch
            elif self.shuffle:
                named = ", ".join(f"{item.utt_id} ({item.place}: {item.value})" for item in bad[:3])
                named = named or f"all of them are left out ({', '.join(request.utt_ids[:3])} ...)"
                raise ValueError(f"batch {request.number} and the next have nothing that can be read: {named}")

    def _what_died(self, error: RuntimeError) -> str:
        request = self._asked[0] if self._asked else None
        where = f"batch {request.number} of epoch {request.epoch}: " if request else ""
        reading = ", ".join(self.reader.reading()) or "no utterance"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"  # between them is a traceback
        return f"{where}{text} ({_READING} {reading}); if memory ran out, lower --num_workers or --batch_bins"


def _end_at_exit(workers: Sequence[Process]) -> None:
    """Let no worker keep this process from ending: Python ends them by SIGTERM, which they ignore, and waits."""
    for worker in workers:
        if not hasattr(worker, "_ended_at_exit"):
            worker._ended_at_exit = True
            Finalize(None, _kill, args=(weakref.ref(worker),), exitpriority=10)


def _kill(reference: weakref.ref[Process]) -> None:
    worker = reference()
    if worker is not None and worker.is_alive():
        worker.kill()
