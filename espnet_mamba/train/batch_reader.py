"""What a process that reads audio does with a batch: load, leave out what cannot be read, collate."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from espnet_mamba.data.bad_items import BadItem
from espnet_mamba.data.errors import AudioError
from espnet_mamba.train.collate import Item

ID_BYTES = 256  # of an utterance's id, kept where a worker that dies leaves it


class Request(NamedTuple):
    """A batch to read: its number in the run, the epoch that its crops depend on, and whose place ``spare`` takes."""

    number: int
    epoch: int
    utt_ids: Sequence[str]
    spare: Sequence[str]  # read only where not one utterance of the batch can be


class Loaded(NamedTuple):
    """A batch that was read; None where nothing could be. ``error`` is what must end the run."""

    utt_ids: list[str]
    batch: dict[str, Tensor] | None
    bad: list[BadItem]
    error: str = ""


class BatchReader(Dataset):
    """Reads whole batches of ``dataset`` (utterance id -> ``(id, arrays)``); ``collate`` has a field ``epoch``."""

    def __init__(
        self, dataset: Any, collate: Any, set_name: str, num_workers: int, without: Collection[str] = ()
    ) -> None:
        """``without``: utterances known to be bad, which are not read."""
        self.dataset, self.collate, self.set_name, self.without = dataset, collate, set_name, frozenset(without)
        # in shared memory: what each worker is reading
        self._reading = torch.zeros(max(1, num_workers), ID_BYTES, dtype=torch.uint8).share_memory_()

    def __getitems__(self, request: Request) -> Loaded:
        """Read one request; the DataLoader calls this with what its batch sampler yields."""
        bad: list[BadItem] = []
        try:
            items = self._load(request.utt_ids, bad) or self._load(request.spare, bad)
            if not items:
                return Loaded([], None, bad)
            return Loaded(*dataclasses.replace(self.collate, epoch=request.epoch)(items), bad)
        except (ValueError, KeyError, OSError) as error:
            return Loaded([], None, bad, str(error.args[0]) if isinstance(error, KeyError) else str(error))

    def reading(self) -> list[str]:
        """Return the utterances that workers are reading now, or were when they died."""
        rows = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in self._reading.numpy()]
        return [row for row in rows if row]

    def _load(self, utt_ids: Sequence[str], bad: list[BadItem]) -> list[Item]:
        items = []
        worker = get_worker_info()
        slot = self._reading[worker.id if worker else 0].numpy()
        for utt_id in utt_ids:
            if utt_id in self.without:
                continue
            self._note(slot, utt_id)
            try:
                item = self.dataset[utt_id]
                if hasattr(self.collate, "check"):
                    self.collate.check(item)
            except AudioError as error:
                limit, remedy = error.limit, error.remedy
                bad.append(BadItem(self.set_name, utt_id, error.reason, error.path, error.value, limit, remedy))
            else:
                items.append(item)
        self._note(slot, "")
        return items

    @staticmethod
    def _note(slot: np.ndarray, utt_id: str) -> None:
        slot[:] = 0
        data = np.frombuffer(utt_id.encode()[:ID_BYTES], np.uint8)
        slot[: len(data)] = data


def as_it_is(loaded: Loaded) -> Loaded:
    """Be a DataLoader's ``collate_fn`` where the data set has collated already."""
    return loaded
