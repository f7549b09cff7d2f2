"""Similarity of every layer with log-mel, phones, words, speakers and emotions: CCA, PWCCA and CKA as rows.

Every value has an interval and the 95 % line of its own null: the same procedure on the same layer, with the view's
side taken from other utterances. R rows, D_l width of a layer, S nulls.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.stats import t as student_t
from threadpoolctl import threadpool_limits
from torch import Tensor

from espnet_mamba.analysis import cca, cka
from espnet_mamba.analysis.cca import CcaSettings
from espnet_mamba.analysis.covariance import CovarianceSums, FoldMoments, assign_folds, moments_of_rows, own_product
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.analysis.views import VIEWS, View
from espnet_mamba.data.manifest import Utterance
from espnet_mamba.targets.features import FeatureSource, iterate_features


@dataclass(frozen=True)
class SimilaritySettings:
    """What layers are compared with and how it is cross-validated."""

    views: tuple[str, ...] = VIEWS  # names; those without a label file are left out with a note
    folds: int = 10  # parts of the utterances: one is dev, one test, the rest train
    nulls: int = 5  # shufflings of utterances behind the 95 % line
    min_instances: int = 5  # rows of a class; rarer classes are left out
    central_third: bool = False  # segments: mean over the middle third only
    silence: tuple[str, ...] = ("sil", "SIL", "sp", "spn")  # labels that are left out
    cca: CcaSettings = field(default_factory=CcaSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        object.__setattr__(self, "silence", tuple(str(label) for label in self.silence))
        if isinstance(self.cca, dict):
            object.__setattr__(self, "cca", CcaSettings(**self.cca))
        for name in self.views:
            if name not in VIEWS:
                raise ValueError(f"views: {name!r} is not one of: {' '.join(VIEWS)}")
        if self.nulls < 2:
            raise ValueError(f"nulls: {self.nulls} is too few for a line, give 2 or more")
        if self.cca.trials > self.folds:
            raise ValueError(f"cca.trials: {self.cca.trials} is more than the {self.folds} folds")


class SimilaritySums:
    """What is kept of one layer for one view, utterance by utterance: its rows, or exact sums of their products.

    Sums take 18 MB a fold at width 768 (log-mel, 5 nulls) however long the audio is; the few rows of a pooled view take
    less and are always kept. With ``keep_rows`` those of frames are kept too, which is faster, and costs nothing where
    all frames are in memory anyway: they are not copied, so do not change them before :meth:`moments`. Either way any
    order of utterances and any sharing among shards gives the same bits; the two ways differ by rounding.
    """

    def __init__(self, view: View, settings: SimilaritySettings, seed: int, keep_rows: bool = False) -> None:
        self.keep_rows = keep_rows or view.pooled
        self.view, self.settings = view, settings
        self.folds = assign_folds(view.with_rows(), settings.folds, seed, view.labels)
        self.nulls = {f"null{number}": view.donors(number, seed) for number in range(settings.nulls)}
        self._seen: set[str] = set()
        self._width: int | None = None
        self._sums: CovarianceSums | None = None
        self._rows: dict[str, np.ndarray] = {}

    def add(self, utt_id: str, frames: np.ndarray) -> None:
        """Take the frames (T, D_l) of one utterance, finite numbers.

        ValueError when it was taken before, or is as wide as another layer.
        """
        rows = self.view.layer_rows(utt_id, frames)
        self._require_width(frames.shape[1], utt_id)
        self._see({utt_id})
        if not len(rows):
            return
        if self.keep_rows:
            self._rows[utt_id] = rows
            return
        if self._sums is None:
            self._sums = self._empty(rows.shape[1])
        self._sums.add(self.folds[utt_id], self._views(utt_id, rows), utt_id)

    def merge(self, other: SimilaritySums) -> None:
        """Add what another shard kept of other utterances of the same set; ValueError when both hold the same one."""
        if other._width is not None:
            self._require_width(other._width, f"a shard of {self.view.name}")
        if self.keep_rows != other.keep_rows:
            raise ValueError(f"{self.view.name}: a shard with rows and one with sums; give all the same keep_rows")
        self._see(other._seen)
        self._rows |= other._rows
        if self._sums is None or other._sums is None:
            self._sums = self._sums or other._sums
        else:
            self._sums.merge(other._sums)

    def moments(self, inner: tuple[SimilaritySums, FoldMoments] | None = None) -> FoldMoments:
        """Return the sums per fold; ValueError when an utterance of the view is still missing.

        ``inner`` is another view of the same layer: where its frames are some of this view's, in the same folds, their
        products are taken from it.
        """
        missing = sorted(set(self.folds) - self._seen)
        if missing:
            raise ValueError(f"{self.view.name}: {len(missing)} utterances were not given, the first is {missing[0]!r}")
        if self._sums is not None:
            return self._sums.moments()
        width = next(iter(self._rows.values())).shape[1]
        few = self.view.num_rows < 2 * max(width, self.view.width)
        own = self._grown(*inner) if inner is not None and self._holds(inner[0]) else None
        return moments_of_rows((self._rows_of_fold(fold) for fold in range(self.settings.folds)), few, own)

    def _holds(self, inner: SimilaritySums) -> bool:
        """Say whether the rows of ``inner`` are some of this view's, in the same folds."""
        if self.view.pooled or not inner.keep_rows or inner.view.pooled or self.folds != inner.folds:
            return False
        units, others = self.view.units, inner.view.units
        return all(np.isin(others[utt_id].start, units[utt_id].start).all() for utt_id in self.folds)

    def _grown(self, inner: SimilaritySums, moments: FoldMoments) -> list[np.ndarray]:
        """Return the layer's products with itself per fold: those of ``inner``'s rows and those of the others."""
        rest: list[list[np.ndarray]] = [[] for _ in range(self.settings.folds)]
        for utt_id, rows in sorted(self._rows.items()):
            own, others = self.view.units[utt_id].start, inner.view.units[utt_id].start
            rest[self.folds[utt_id]].append(rows[np.isin(own, others, invert=True)])
        blocks = moments.blocks["layer", "layer"]
        return [block + own_product(parts) for block, parts in zip(blocks, rest, strict=True)]

    def _rows_of_fold(self, fold: int) -> dict[str, list[np.ndarray]]:
        parts = [self._views(utt_id, rows) for utt_id, rows in sorted(self._rows.items()) if self.folds[utt_id] == fold]
        return {name: [part[name] for part in parts] for name in parts[0]}

    def _require_width(self, width: int, where: str) -> None:
        if self._width not in (None, width):
            raise ValueError(
                f"{where}: {width} features a frame, those before had {self._width}; sums are of one layer of one model"
            )
        self._width = width

    def _see(self, utt_ids: set[str]) -> None:
        twice = sorted(self._seen & utt_ids)
        if twice:
            raise ValueError(f"{twice[0]}: given twice to the sums of {self.view.name}; shards must not overlap")
        self._seen |= utt_ids

    def _empty(self, width: int) -> CovarianceSums:
        others = ["target", *self.nulls]
        widths = {"layer": width} | dict.fromkeys(others, self.view.width)
        return CovarianceSums(widths, [("layer", name) for name in others], self.settings.folds)

    def _views(self, utt_id: str, rows: np.ndarray) -> dict[str, np.ndarray]:
        shuffled = {name: self.view.target_rows(utt_id, donors[utt_id]) for name, donors in self.nulls.items()}
        return {"layer": rows, "target": self.view.target_rows(utt_id)} | shuffled


def similarity_rows(
    system: str,
    features: LayerFeatures,
    views: Sequence[View],
    settings: SimilaritySettings,
    seed: int,
    num_threads: int | None = None,
) -> list[LayerValue]:
    """Return the rows of all layers with all views; ``num_threads`` (torch's) share the layers and change no value.

    A view with too few utterances or rows to be cross-validated is left out, and that is printed; for a constant layer
    see :func:`rows_of_layer`. ValueError when a layer is not finite, or a view was made for other utterances.
    """

    def measure(job: tuple[list[View], int]) -> list[list[LayerValue]]:
        group, layer = job
        kept = [SimilaritySums(view, settings, seed, keep_rows=True) for view in group]
        for utt_id, frames in zip(features.utt_ids, features.of_utterance(layer), strict=True):
            _require_finite(utt_id, features.names[layer], frames)
            for sums in kept:
                sums.add(utt_id, frames.numpy())
        found: list[list[LayerValue]] = []
        inner = None
        for sums in kept:
            inner = (sums, sums.moments(inner))
            found.append(_rows_of_layer(system, layer, features.names[layer], *inner))
        return found

    width = max(layer.shape[1] for layer in features.layers)
    usable = [view for view in views if _enough(system, view, width, settings)]
    # Views of frames go together, the smallest first: the next ones add to its products.
    framed = sorted((view for view in usable if not view.pooled), key=lambda view: view.num_rows)
    groups = [group for group in (framed, *([view] for view in usable if view.pooled)) if group]
    jobs = [(group, layer) for group in groups for layer in range(len(features.names))]
    # Two layers side by side take half the time, one product on two cores does not.
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(num_threads or torch.get_num_threads()) as pool:
        found = list(pool.map(measure, jobs))
    by_job = {
        (view.name, layer): rows
        for (group, layer), of_group in zip(jobs, found, strict=True)
        for view, rows in zip(group, of_group, strict=True)
    }
    return [row for view in usable for layer in range(len(features.names)) for row in by_job[view.name, layer]]


def accumulate(
    source: FeatureSource,
    utterances: Sequence[Utterance],
    views: Sequence[View],
    settings: SimilaritySettings,
    seed: int,
) -> dict[tuple[str, str], SimilaritySums]:
    """Pass once over audio and keep sums only: (layer name, view name) -> sums, to be merged over shards.

    A view must hold all utterances of the set, not the shard's only: folds and nulls are drawn from them.
    """
    kept = {(name, view.name): SimilaritySums(view, settings, seed) for name in source.names for view in views}
    for utterance, layers in iterate_features(source, utterances):
        for name, frames in zip(source.names, layers, strict=True):
            _require_finite(utterance.utt_id, name, frames)
            for view in views:
                kept[name, view.name].add(utterance.utt_id, frames.numpy())
    return kept


def rows_of_layer(system: str, layer: int, layer_name: str, sums: SimilaritySums) -> list[LayerValue]:
    """Return the four rows of one layer with one view; ``null`` is the 95 % line, ``num_frames`` counts the rows.

    Where the layer or the view is the same in all rows they are nan and flagged ``constant``, and that is printed.
    """
    # With several threads BLAS sums in another order: values would hang on their number.
    with threadpool_limits(1, user_api="blas"):
        return _rows_of_layer(system, layer, layer_name, sums, sums.moments())


def _rows_of_layer(
    system: str, layer: int, layer_name: str, sums: SimilaritySums, moments: FoldMoments
) -> list[LayerValue]:
    settings, nulls = sums.settings, list(sums.nulls)
    row = LayerValue(
        system=system,
        layer=layer,
        layer_name=layer_name,
        measure="",
        estimator="",
        reference=sums.view.name,
        value=float("nan"),
        ceiling=1.0,
        unit="correlation",
        num_frames=moments.count(range(settings.folds)),
        num_utts=len(sums.folds),
    )
    heldout = f"heldout_{settings.folds}folds"
    try:
        trials = cca.cross_validate(moments, "layer", "target", settings.cca, nulls)
    except cca.ConstantView as error:
        print(f"{system}, {layer_name}: no similarity with {sums.view.name}: {error}", flush=True)
        estimators = dict.fromkeys(cca.MEASURES, heldout) | dict.fromkeys(cka.MEASURES, "all_rows")
        return [replace(row, measure=name, estimator=how, flag="constant") for name, how in estimators.items()]
    except ValueError as error:
        raise ValueError(f"{system}, {layer_name}: {error}") from error
    aligned = cka.align(moments, "layer", "target", nulls)
    rows = []
    for number, measure in enumerate(cca.MEASURES):
        scores = trials.scores[:, number]
        low, high = split_interval(scores, settings.folds)
        null = null_line(trials.nulls[:, :, number].mean(1))
        value = float(scores.mean())
        rows.append(replace(row, measure=measure, estimator=heldout, value=value, low=low, high=high, null=null))
    for number, measure in enumerate(cka.MEASURES):
        value = float(aligned.values[number])
        low, high = jackknife_interval(value, aligned.left_out[:, number])
        null = null_line(aligned.nulls[:, number])
        rows.append(replace(row, measure=measure, estimator="all_rows", value=value, low=low, high=high, null=null))
    return rows


def split_interval(scores: np.ndarray, num_folds: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean of held-out ``scores`` (trials,), at most 1.

    Trials share most of their training rows, so their scatter alone is too small an error: the variance of the mean is
    taken as s^2 (1 / trials + test rows / train rows) (Nadeau and Bengio 2003).
    """
    count = len(scores)
    if count < 2:
        return float("nan"), float("nan")
    error = float(scores.std(ddof=1)) * np.sqrt(1.0 / count + 1.0 / (num_folds - 2))
    return _around(float(scores.mean()), error, count - 1)


def jackknife_interval(value: float, left_out: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of ``value`` from the values without each fold (F,): folds hold whole utterances."""
    count = len(left_out)
    error = float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))
    return _around(value, error, count - 1)


def null_line(nulls: np.ndarray) -> float:
    """Return what a further null stays below with 95 %, if nulls (S,) are Gaussian: Student's one-sided bound."""
    count = len(nulls)
    spread = float(nulls.std(ddof=1)) * np.sqrt(1.0 + 1.0 / count)
    return float(nulls.mean() + student_t.ppf(0.95, count - 1) * spread)


def _around(value: float, error: float, degrees: int) -> tuple[float, float]:
    reach = float(student_t.ppf(0.975, degrees)) * error
    return value - reach, min(value + reach, max(1.0, value))


def _require_finite(utt_id: str, name: str, frames: Tensor) -> None:
    if not torch.isfinite(frames).all():
        raise ValueError(f"{utt_id}: {name} holds NaN or infinity; check the model and this recording")


def _enough(system: str, view: View, width: int, settings: SimilaritySettings) -> bool:
    """Say whether a view can be cross-validated; print why not, or what fewer rows than dimensions mean."""
    utts, rows = len(view.with_rows()), view.num_rows
    if utts < settings.folds or rows < 3 * settings.folds:
        print(
            f"{system}: similarity with {view.name} is left out: {utts} utterances with {rows} rows are too few for "
            f"{settings.folds} folds of 3 rows",
            flush=True,
        )
        return False
    train, most = rows * (settings.folds - 2) // settings.folds, max(width, view.width)
    if train < most:
        print(
            f"{system}: {view.name} has {train} rows to fit {most} dimensions: held-out CCA is that of regularised "
            "directions, a lower bound of the layer's own; plain CKA is inflated, see its null",
            flush=True,
        )
    return True
