"""The second views that layers are compared with: log-mel frames, phones, speakers, words and emotions.

A view says for every utterance which frames make a row and what stands against that row: values (log-mel) or a class.
T frames and R rows of one utterance, D_l width of a layer, d width of the view (K for K classes, one-hot).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from espnet_mamba.analysis.sampling import seed_from
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.data.alignment import frame_labels
from espnet_mamba.data.kaldi import Segment, read_ctm, read_table

VIEWS = ("logmel", "phones", "phone_segments", "word", "speaker", "emotion")
LABEL_FILES = {
    "phones": "phones.ctm",
    "phone_segments": "phones.ctm",
    "word": "words.ctm",
    "speaker": "utt2spk",
    "emotion": "utt2emotion",
}
_RATE = 16000  # samples a second
_SLACK = 0.1  # seconds that an alignment may go past the audio: aligners round, and drop the last partial frame


class FrameGrid(NamedTuple):
    """Where frames lie: frame t is centred on sample ``hop * t + centre`` of 16 kHz audio."""

    hop: int = 320
    centre: int = 200


HUBERT_GRID = FrameGrid()


@dataclass(frozen=True)
class Units:
    """The rows of one utterance: row r is the mean of frames start[r] .. stop[r] - 1."""

    num_frames: int  # T that the utterance must have
    start: np.ndarray  # (R,)
    stop: np.ndarray  # (R,)
    target: np.ndarray  # (R,) class numbers or (R, d) values


@dataclass(frozen=True)
class View:
    """One second view of a set of utterances; ``classes`` is empty where targets are values."""

    name: str
    width: int
    units: dict[str, Units]
    classes: tuple[str, ...] = ()
    pooled: bool = False  # rows are means of several frames, so there are few
    labels: dict[str, str] = field(default_factory=dict)  # utterance -> its one class, where it has one

    @property
    def num_rows(self) -> int:
        """Rows of all utterances."""
        return sum(len(units.start) for units in self.units.values())

    def with_rows(self) -> list[str]:
        """Return the utterances that have rows, sorted."""
        return sorted(utt_id for utt_id, units in self.units.items() if len(units.start))

    def layer_rows(self, utt_id: str, frames: np.ndarray) -> np.ndarray:
        """Return the layer's side of the rows: (T, D_l) -> (R, D_l); means as float64, frames as given.

        ValueError when the view does not know the utterance or was made for another number of frames.
        """
        if utt_id not in self.units:
            raise ValueError(f"{utt_id}: view {self.name} was made without this utterance")
        units = self.units[utt_id]
        if units.num_frames != len(frames):
            raise ValueError(
                f"{utt_id}: view {self.name} was made for {units.num_frames} frames, the layer has {len(frames)}; "
                "both must come from the same recording at the same frame rate"
            )
        if not self.pooled:
            return frames if len(units.start) == len(frames) else frames[units.start]
        means = [
            frames[start:stop].mean(0, dtype=np.float64) for start, stop in zip(units.start, units.stop, strict=True)
        ]
        return np.stack(means) if means else np.zeros((0, frames.shape[1]))

    def target_rows(self, utt_id: str, donor: str | None = None) -> np.ndarray:
        """Return the view's side of the rows, (R, d) float64; of utterance ``donor``, repeated or cut, if given."""
        target = self.units[donor or utt_id].target
        if donor is not None:
            target = target[np.arange(len(self.units[utt_id].start)) % len(target)]
        if not self.classes:
            return np.asarray(target, dtype=np.float64)
        one_hot = np.zeros((len(target), self.width))
        one_hot[np.arange(len(target)), target] = 1.0
        return one_hot

    def donors(self, number: int, seed: int) -> dict[str, str]:
        """Return for every utterance with rows another one whose targets it gets in null ``number``.

        Utterances stand in a circle in an order that is drawn, each takes what the next one has. What any two
        utterances share stays: slow change from frame to frame, silence at both ends, frequent words.
        """
        circle = sorted(self.with_rows(), key=lambda utt_id: seed_from("null", self.name, number, seed, utt_id))
        return dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))


class TooFewClasses(ValueError):
    """A label file holds fewer than two classes with enough rows."""


class _Labelled(NamedTuple):
    """The rows of one utterance before classes are numbered."""

    num_frames: int
    start: np.ndarray
    stop: np.ndarray
    labels: list[str]


def frame_view(name: str, features: LayerFeatures, layer: int = 0) -> View:
    """Return the frames of one layer (log-mel, or layer 0 of the model itself) as a view."""
    units = {
        utt_id: Units(len(frames), np.arange(len(frames)), np.arange(1, len(frames) + 1), frames.float().numpy())
        for utt_id, frames in zip(features.utt_ids, features.of_utterance(layer), strict=True)
    }
    return View(name, features.layers[layer].shape[1], units)


def phone_view(
    segments: Mapping[str, Sequence[Segment]],
    sizes: Mapping[str, int],
    where: str,
    silence: Sequence[str],
    min_instances: int = 1,
    grid: FrameGrid = HUBERT_GRID,
) -> View:
    """Return the phone at the centre of every frame, silence left out; ``sizes`` are T of the utterances.

    ValueError when ``where`` (the file) misses an utterance or goes past its audio, or names fewer than two phones.
    """
    found = {}
    for utt_id, size in sizes.items():
        labels = frame_labels(_segments_of(utt_id, segments, size, where, grid), size, grid.hop, grid.centre)
        spoken = np.array([frame for frame, label in enumerate(labels) if label not in silence], dtype=np.int64)
        found[utt_id] = _Labelled(size, spoken, spoken + 1, [labels[frame] for frame in spoken])
    return _class_view("phones", found, where, min_instances, pooled=False)


def segment_view(
    name: str,
    segments: Mapping[str, Sequence[Segment]],
    sizes: Mapping[str, int],
    where: str,
    silence: Sequence[str],
    min_instances: int = 1,
    central_third: bool = False,
    grid: FrameGrid = HUBERT_GRID,
) -> View:
    """Return one row per segment (word or phone): the mean of the frames whose centres it holds, silence left out.

    A segment without a frame's centre has no row. ``central_third`` leaves out a third of its frames at each end, away
    from the neighbours' influence. ValueError as in :func:`phone_view`.
    """
    found = {}
    for utt_id, size in sizes.items():
        rows: list[tuple[int, int, str]] = []
        for segment in _segments_of(utt_id, segments, size, where, grid):
            start, stop = _frames(segment, size, grid)
            third = max(stop - start, 0) // 3 if central_third else 0
            if segment.label not in silence and start < stop:
                rows.append((start + third, stop - third, segment.label))
        bounds = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
        found[utt_id] = _Labelled(size, bounds[:, 0], bounds[:, 1], [row[2] for row in rows])
    return _class_view(name, found, where, min_instances, pooled=True)


def utterance_view(
    name: str, labels: Mapping[str, str], sizes: Mapping[str, int], where: str, min_instances: int = 1
) -> View:
    """Return one row per utterance: the mean of all its frames against its label (speaker, emotion).

    ValueError when ``where`` misses an utterance or fewer than two labels remain.
    """
    missing = sorted(utt_id for utt_id in sizes if utt_id not in labels)
    if missing:
        raise ValueError(f"{where}: no {name} for {len(missing)} utterances, the first is {missing[0]!r}; add them")
    found = {
        utt_id: _Labelled(size, np.zeros(1, dtype=np.int64), np.array([size]), [labels[utt_id]])
        for utt_id, size in sizes.items()
    }
    return _class_view(name, found, where, min_instances, pooled=True)


def open_views(
    names: Sequence[str],
    folder: str | Path,
    sizes: Mapping[str, int],
    silence: Sequence[str],
    min_instances: int,
    central_third: bool = False,
    grid: FrameGrid = HUBERT_GRID,
) -> tuple[list[View], list[str]]:
    """Return the label views of a ``dump/raw/<set>`` folder, and a line for each that has no file or too few classes.

    ``sizes`` are T of the utterances to be used; log-mel is no label and passed over, see :func:`frame_view`.
    """
    views, notes = [], []
    for name in names:
        if name not in LABEL_FILES:
            continue
        path = Path(folder) / LABEL_FILES[name]
        where = str(path)
        if not path.is_file():
            notes.append(f"similarity with {name} is left out: it needs {path}")
            continue
        try:
            if name in ("speaker", "emotion"):
                view = utterance_view(name, read_table(path), sizes, where, min_instances)
            elif name == "phones":
                view = phone_view(read_ctm(path), sizes, where, silence, min_instances, grid)
            else:
                view = segment_view(name, read_ctm(path), sizes, where, silence, min_instances, central_third, grid)
            views.append(view)
        except TooFewClasses as error:
            notes.append(f"similarity with {name} is left out: {error}")
    return views, notes


def _frames(segment: Segment, size: int, grid: FrameGrid) -> tuple[int, int]:
    """Return the frames whose centres lie in start <= t < end, as first and one past the last."""
    # Whole samples: 0.1 s * 16000 must not fall a hair before a centre because of floating point.
    samples = [round(seconds * _RATE) for seconds in (segment.start, segment.end)]
    first, stop = [-((grid.centre - sample) // grid.hop) for sample in samples]
    return max(first, 0), min(stop, size)


def _segments_of(
    utt_id: str, segments: Mapping[str, Sequence[Segment]], size: int, where: str, grid: FrameGrid
) -> Sequence[Segment]:
    if utt_id not in segments:
        raise ValueError(f"{where}: nothing for utterance {utt_id!r}; add it or remove the file")
    audio = (grid.hop * size + 2 * grid.centre) / _RATE  # the most that T frames leave room for
    for segment in segments[utt_id]:
        if segment.end > audio + _SLACK:
            raise ValueError(
                f"{where}: {utt_id}: {segment.label!r} ends at {segment.end:.2f} s, the audio at {audio:.2f} s; "
                "correct the times"
            )
    return segments[utt_id]


def _class_view(name: str, found: Mapping[str, _Labelled], where: str, min_instances: int, pooled: bool) -> View:
    """Number the classes in alphabetical order; rows of those with fewer than ``min_instances`` rows are dropped."""
    counts = Counter(label for rows in found.values() for label in rows.labels)
    classes = tuple(sorted(label for label, count in counts.items() if count >= min_instances))
    if len(classes) < 2:
        raise TooFewClasses(
            f"{where}: {len(classes)} of {len(counts)} labels have {min_instances} rows or more; {name} needs two"
        )
    numbers = {label: number for number, label in enumerate(classes)}
    units, single = {}, {}
    for utt_id, rows in found.items():
        kept = np.array([row for row, label in enumerate(rows.labels) if label in numbers], dtype=np.int64)
        target = np.array([numbers[rows.labels[row]] for row in kept], dtype=np.int64)
        units[utt_id] = Units(rows.num_frames, rows.start[kept], rows.stop[kept], target)
        if len(set(rows.labels)) == 1:
            single[utt_id] = rows.labels[0]
    return View(name, len(classes), units, classes, pooled, single)
