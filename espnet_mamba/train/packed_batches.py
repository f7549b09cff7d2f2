"""``batch_type: packed``: batches that become one row of utterances without padding (``layers/packing.py``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from espnet2.samplers.build_batch_sampler import BATCH_TYPES

from espnet_mamba.data.compact_table import read_lengths

# On import, so that ESPnet's own --batch_type takes the name.
BATCH_TYPES["packed"] = "Rows of several utterances one after the other, up to batch_bins samples, without padding."


def packed_batches(shape_file: str | Path, batch_bins: int, min_batch_size: int, seed: int) -> list[tuple[str, ...]]:
    """Fill batches with whole utterances in a random order of their own, each up to ``batch_bins`` samples.

    Args:
        shape_file: lines ``utterance samples``.
        batch_bins: samples of a batch; an utterance that is longer has a batch to itself.
        min_batch_size: least number of utterances of a batch (one per process).
        seed: of the order.

    Raises:
        ValueError: fewer utterances than a batch needs.
    """
    ids, lengths = read_lengths(shape_file)
    if len(ids) < min_batch_size:
        raise ValueError(f"{shape_file}: {len(ids)} utterances, a batch needs {min_batch_size}")
    batches: list[list[str]] = [[]]
    room = batch_bins
    order = np.random.default_rng(seed).permutation(len(ids))
    for utt_id, samples in zip(ids[order].tolist(), lengths[order].tolist(), strict=True):
        if samples > room and len(batches[-1]) >= min_batch_size:
            batches.append([])
            room = batch_bins
        batches[-1].append(utt_id.decode())
        room -= samples
    if len(batches[-1]) < min_batch_size:  # the rest is too little for a batch of its own
        batches[-2].extend(batches.pop())
    return [tuple(batch) for batch in batches]
