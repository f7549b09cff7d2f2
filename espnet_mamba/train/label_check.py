"""Before the first step, not in the middle of a night: has every utterance as many labels as its audio has frames?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from espnet_mamba.data.bad_items import BadItem
from espnet_mamba.data.compact_table import read_lengths
from espnet_mamba.targets.labels import FrameLabels, without_labels
from espnet_mamba.train.collate import num_labels

_NAMED = 5  # in an error


def check_labels(labels: str | Path, lengths: str | Path, label_rate: int, set_name: str) -> list[BadItem]:
    """Compare the numbers of ``labels`` (``.npy``) with the samples in ``lengths`` (``utt2num_samples``).

    Returns:
        The utterances that the targets stage could not read and left without labels: a run does without them too.

    Raises:
        ValueError: names the utterances whose labels are missing otherwise, or do not fit.
    """
    ids, num_samples = read_lengths(lengths)
    found, expected = _label_counts(FrameLabels(labels), ids), num_labels(num_samples, label_rate)
    odd = np.flatnonzero(found != expected)
    known = without_labels(labels) if len(odd) else {}
    left_out = [i for i in odd if found[i] < 0 and ids[i].decode() in known]
    odd = np.setdiff1d(odd, left_out)
    if len(odd):
        named = "; ".join(_problem(ids[i].decode(), num_samples[i], found[i], label_rate) for i in odd[:_NAMED])
        more = f" (and {len(odd) - _NAMED} more)" if len(odd) > _NAMED else ""
        raise ValueError(f"{labels}: {named}{more}; rerun the targets stage")
    remedy = "mend it, then rerun stage 2 (check) and the targets stage"
    names = [ids[i].decode() for i in left_out]
    return [
        BadItem(set_name, name, "no_labels", str(labels), known[name], "left out of the targets", remedy)
        for name in names
    ]


def _label_counts(labels: FrameLabels, ids: np.ndarray) -> np.ndarray:
    """Return the number of labels (N,) of utterances (N,) given as bytes, -1 where there are none."""
    if not len(labels):
        return np.full(len(ids), -1)
    names = np.array([utt_id.encode() for utt_id in labels], "S")
    place = np.minimum(np.searchsorted(names, ids), len(names) - 1)
    return np.where(names[place] == ids, labels.counts()[place], -1)


def _problem(utt_id: str, num_samples: int, found: int, label_rate: int) -> str:
    if found < 0:
        return f"{utt_id}: no labels"
    expected = num_labels(num_samples, label_rate)
    return f"{utt_id}: {found} labels, but {num_samples} samples at {label_rate} labels per second have {expected}"
