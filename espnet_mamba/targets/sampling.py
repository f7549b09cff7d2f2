"""Which utterances k-means is fitted on, and their frames in one array. T frames of an utterance, D feature width."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from espnet_mamba.data.manifest import Utterance


def choose_utterances(utterances: Sequence[Utterance], hop: int, max_frames: int, seed: int) -> list[Utterance]:
    """Return utterances with about ``max_frames`` frames: those whose ids, with the seed, have the smallest hashes.

    As fair a draw as a reservoir of utterances, but known before any audio is read, and the same for everyone who asks.
    """
    order = sorted(utterances, key=lambda u: (zlib.crc32(f"{seed} {u.utt_id}".encode()), u.utt_id))
    chosen, total = [], 0
    for utterance in order:
        total += max(0, (utterance.num_samples - 400) // hop + 1)
        if chosen and total > max_frames:
            break
        chosen.append(utterance)
    return chosen


def join_frames(sizes: Mapping[str, int], read: Callable[[str], Tensor], max_frames: int) -> Tensor:
    """Return the frames of all utterances in order of their ids ``(F, D)``, ``max_frames`` at most.

    Args:
        sizes: utterance -> T.
        read: returns an utterance's frames ``(T, D)``; called once for each, so that it may let go of them.
        max_frames: the rest is left out.
    """
    total, start = min(max_frames, sum(sizes.values())), 0
    joined = torch.zeros(0, 1)
    for utt_id in sorted(sizes):
        frames = read(utt_id)[: total - start]
        if not start:
            joined = torch.empty(total, frames.shape[1])
        joined[start : start + len(frames)] = frames
        start += len(frames)
    return joined
