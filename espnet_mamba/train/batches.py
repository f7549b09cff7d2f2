"""Which utterances a batch holds, by ``--batch_type``, and who takes it."""

from __future__ import annotations

import argparse
from typing import Any

from espnet2.samplers.build_batch_sampler import build_batch_sampler
from espnet2.tasks.abs_task import IteratorOptions

from espnet_mamba.data.compact_table import read_lengths
from espnet_mamba.train.bucket_batches import BucketBatches
from espnet_mamba.train.iterators import BatchRow, FixedBatches
from espnet_mamba.train.packed_batches import packed_batches


def add_arguments(group: Any) -> None:
    """Add what reading audio has beyond ESPnet's own options."""
    group.add_argument(
        "--max_unreadable",
        type=float,
        default=0.05,
        help="share of a set's utterances that may turn out unreadable before training stops; they are left out",
    )


def build_batches(
    args: argparse.Namespace, iter_options: IteratorOptions, rank: int, world: int
) -> tuple[BatchRow, tuple[int, int] | None]:
    """Return the row of batches, and ``(rank, world)`` where processes take turns rather than parts of each."""
    shape_file, bins = iter_options.shape_files[0], iter_options.batch_bins
    if iter_options.batch_type == "bucket":
        ids, lengths = read_lengths(shape_file)
        if iter_options.train:
            return BucketBatches(ids, lengths, bins, args.seed, args.max_crop_samples), (rank, world)
        return BucketBatches(ids, lengths, bins, args.seed, jitter=0.0), (rank, world)
    if iter_options.batch_type == "packed":
        batches = packed_batches(shape_file, bins, world, args.seed)
    else:
        sampler = build_batch_sampler(
            type=iter_options.batch_type,
            shape_files=iter_options.shape_files,
            fold_lengths=args.fold_length,
            batch_size=iter_options.batch_size,
            batch_bins=bins,
            sort_in_batch=args.sort_in_batch,
            sort_batch=args.sort_batch,
            min_batch_size=world,
        )
        batches = list(sampler)
    return FixedBatches([batch[rank::world] for batch in batches], args.seed, iter_options.train), None
