"""Batches by number: batch i of a run is a pure function of (seed, i), so that resuming is arithmetic."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from torch.utils.data import DataLoader, Dataset

from espnet_mamba.train.collate import HubertCollate
from espnet_mamba.train.signals import ignore_in_worker


class StepIterFactory(AbsIterFactory):
    """Iterates a fixed set of batches, each pass over it in an order of its own.

    ESPnet's ``num_iters_per_epoch`` cuts the endless row of passes into epochs of equal size.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: Sequence[Sequence[str]],
        collate: HubertCollate,
        seed: int,
        shuffle: bool,
        num_iters_per_epoch: int | None,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        self.dataset, self.batches, self.collate = dataset, list(batches), collate
        self.seed, self.shuffle = seed, shuffle
        self.iters_per_epoch = num_iters_per_epoch or len(self.batches)
        self.loader_options = {"num_workers": num_workers, "pin_memory": pin_memory, "worker_init_fn": ignore_in_worker}

    def batch(self, index: int) -> Sequence[str]:
        """Return the utterance ids of batch ``index`` of the run, counted from 0."""
        number, position = divmod(index, len(self.batches))
        if self.shuffle:
            position = int(np.random.default_rng([self.seed, number]).permutation(len(self.batches))[position])
        return self.batches[position]

    def build_iter(self, epoch: int, shuffle: bool | None = None, skip: int = 0) -> Iterator[Any]:
        """Iterate epoch ``epoch`` (from 1), without its first ``skip`` batches."""
        first = (epoch - 1) * self.iters_per_epoch if self.shuffle else 0
        indices = range(first + skip, first + self.iters_per_epoch)
        loader = DataLoader(
            self.dataset,
            batch_sampler=[list(self.batch(index)) for index in indices],
            collate_fn=dataclasses.replace(self.collate, epoch=epoch),
            **self.loader_options,
        )
        return iter(loader)
