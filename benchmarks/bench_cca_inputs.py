"""What bench_cca.py measures on: layers with something of log-mel, phones, words and speakers in them, and the views.

Numbers of phones, words, classes and speakers are near those of ten minutes of a read corpus.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from espnet_mamba.analysis.similarity import SimilaritySettings
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.views import View, frame_view, phone_view, segment_view, utterance_view
from espnet_mamba.data.kaldi import Segment

_FRAMES_PER_MINUTE, _SECONDS_PER_FRAME = 3000, 0.02
_SPEAKERS, _EMOTIONS, _PHONES, _WORDS_PER_MINUTE = 8, 7, 39, 40
_BANDS = 80


class Size(NamedTuple):
    """How much speech, in how many utterances; layers and their width."""

    utterances: int
    minutes: float
    layers: int
    width: int


class Inputs(NamedTuple):
    """The frames of all layers and all views of them."""

    layers: LayerFeatures
    views: list[View]


def make_inputs(size: Size) -> Inputs:
    """Make frames and labels; the deeper the layer, the less of log-mel and the more of phones is in it."""
    rng = np.random.default_rng(0)
    mean = size.minutes * _FRAMES_PER_MINUTE / size.utterances
    lengths = rng.integers(int(0.6 * mean), int(1.4 * mean) + 1, size.utterances)
    ids = [f"u{index:04d}" for index in range(size.utterances)]
    sizes = dict(zip(ids, lengths.tolist(), strict=True))
    owner = torch.from_numpy(np.repeat(np.arange(size.utterances), lengths))
    phone_of = {utt_id: _segments(rng, frames) for utt_id, frames in sizes.items()}
    vocabulary = max(8, int(_WORDS_PER_MINUTE * size.minutes))
    words = {utt_id: _words(rng, segments, vocabulary) for utt_id, segments in phone_of.items()}
    classes = size.utterances // SimilaritySettings().min_instances
    speakers = {utt_id: f"s{index % min(_SPEAKERS, classes)}" for index, utt_id in enumerate(ids)}
    emotions = {utt_id: f"e{index % min(_EMOTIONS, classes)}" for index, utt_id in enumerate(ids)}
    settings = SimilaritySettings()
    few = settings.min_instances
    phones = phone_view(phone_of, sizes, "made", settings.silence, few)
    phone = np.concatenate([_classes(phones, utt_id, frames) for utt_id, frames in sizes.items()])
    logmel = _logmel(rng, phone)
    views = [
        frame_view("logmel", LayerFeatures(["logmel"], [torch.from_numpy(logmel)], ids, owner)),
        phones,
        segment_view("phone_segments", phone_of, sizes, "made", settings.silence, few),
        segment_view("word", words, sizes, "made", settings.silence, few),
        utterance_view("speaker", speakers, sizes, "made", few),
        utterance_view("emotion", emotions, sizes, "made", few),
    ]
    layers = [_layer(rng, logmel, phone, depth, size.width) for depth in np.linspace(0.0, 1.0, size.layers)]
    names = [f"layer{index}" for index in range(size.layers)]
    return Inputs(LayerFeatures(names, layers, ids, owner), views)


def _segments(rng: np.random.Generator, frames: int) -> list[Segment]:
    """Return phones of 2 to 14 frames until the utterance is full, one in ten of them silence."""
    segments, start = [], 0
    while start < frames - 1:
        stop = min(start + int(rng.integers(2, 15)), frames - 1)
        label = "sil" if rng.random() < 0.1 else f"p{int(_PHONES * rng.random() ** 1.5):02d}"
        segments.append(Segment(start * _SECONDS_PER_FRAME, stop * _SECONDS_PER_FRAME, label))
        start = stop
    return segments


def _words(rng: np.random.Generator, phones: list[Segment], vocabulary: int) -> list[Segment]:
    """Return words of three phones; few words are frequent and most are rare."""
    return [
        Segment(group[0].start, group[-1].end, f"w{int(vocabulary * rng.random() ** 3):03d}")
        for group in (phones[first : first + 3] for first in range(0, len(phones), 3))
    ]


def _classes(phones: View, utt_id: str, frames: int) -> np.ndarray:
    """Return the phone of every frame, one past the last for silence: (T,)."""
    classes = np.full(frames, phones.width)
    units = phones.units[utt_id]
    classes[units.start] = units.target
    return classes


def _logmel(rng: np.random.Generator, classes: np.ndarray) -> np.ndarray:
    """Return (F, 80) float32: a place per phone, and neighbouring frames alike."""
    noise = rng.standard_normal((len(classes), _BANDS))
    smooth = (noise + np.roll(noise, 1, axis=0) + np.roll(noise, 2, axis=0)) / 3.0
    return (rng.standard_normal((classes.max() + 1, _BANDS))[classes] + smooth).astype(np.float32)


def _layer(rng: np.random.Generator, logmel: np.ndarray, classes: np.ndarray, depth: float, width: int) -> torch.Tensor:
    """Return (F, width) float32: ``depth`` 0 is mostly log-mel, 1 mostly phones."""
    frames = rng.standard_normal((len(logmel), width), dtype=np.float32)
    frames += (1.0 - depth) * (logmel @ rng.standard_normal((_BANDS, width)).astype(np.float32) / 9.0)
    frames += depth * rng.standard_normal((classes.max() + 1, width)).astype(np.float32)[classes]
    return torch.from_numpy(frames)
