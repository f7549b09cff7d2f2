"""All estimates of mutual information of one system: every input point, every estimator, groups of equal width.

F frames, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from espnet_mamba.analysis.ksg import ksg_rows
from espnet_mamba.analysis.mutual_information import held_out_rows, mine_paper_rows, per_utterance_rows
from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue

Reference = tuple[str, Tensor]
_Estimate = Callable[[str, LayerFeatures, Reference, Sequence[int]], list[LayerValue]]


def information_rows(
    system: str,
    features: LayerFeatures,
    inputs: dict[str, Tensor],
    settings: AnalysisSettings,
    seed: int,
) -> list[LayerValue]:
    """Return the rows of every estimator with every input point of ``settings.references`` that is there.

    ``inputs`` holds frames (F, Dx) by name (conv, logmel); layer 0 is the features' own and meets layers 1..N, the
    others meet layers 0..N. Layers of one width share their critics; a width has its own, so that no layer's value
    hangs on another's. ValueError when an input point has another number of frames than the layers.
    """
    jobs = [
        (how, estimate, reference, layers)
        for reference, every in _references(features, inputs, settings)
        for layers in width_groups(features, every)
        for how, estimate in _estimators(settings, seed).items()
    ]
    rows: list[LayerValue] = []
    progress = tqdm(jobs, desc=f"{system} information", unit="estimate", mininterval=5)
    for how, estimate, reference, layers in progress:
        progress.set_postfix_str(f"{how} with {reference[0]}", refresh=False)
        found = estimate(system, features, reference, layers)
        if how in ("bounds", "per_utterance"):
            found = _flagged(found, features, layers, settings, per_utterance=how == "per_utterance")
        rows += found
    return rows


def width_groups(features: LayerFeatures, layers: Sequence[int]) -> list[list[int]]:
    """Return the layers by width, in order of their first layer."""
    groups: dict[int, list[int]] = {}
    for layer in layers:
        groups.setdefault(features.layers[layer].shape[1], []).append(layer)
    return list(groups.values())


def information_notes(system: str, features: LayerFeatures, settings: AnalysisSettings) -> list[str]:
    """Return lines on what the data are too short for: utterances below a minibatch, frames below dimensions."""
    notes = []
    sizes, width = features.sizes, max(layer.shape[1] for layer in features.layers)
    if any(name.startswith("mine_paper") for name in settings.information):
        minibatch = settings.mine_paper.minibatch
        short = sum(size < minibatch for size in sizes)
        if short:
            notes.append(
                f"mine_paper: {short} of {len(sizes)} utterances have fewer than {minibatch} frames (one minibatch): "
                "the published protocol trains nothing on them, so they are left out of its mean"
            )
    train = _train_frames(len(features.utterance), settings)
    dims = _dimensions(width, settings)
    if train < dims:
        notes.append(
            f"{system}: {train} frames to train on for {dims} dimensions: information that the frames cannot show is "
            "not in the held-out bounds (flag few_frames), pca keeps fewer components than there are dimensions, and "
            "probes, decoders and CCA are those of shrunken directions: all are lower bounds of what the layer holds"
        )
    return notes


def _references(
    features: LayerFeatures, inputs: dict[str, Tensor], settings: AnalysisSettings
) -> Iterator[tuple[Reference, list[int]]]:
    every = list(range(len(features.names)))
    for name in settings.references:
        if name == "layer0" and len(every) > 1:
            yield (name, features.layers[0]), every[1:]
        elif name in inputs:
            if len(inputs[name]) != len(features.utterance):
                raise ValueError(
                    f"{name} has {len(inputs[name])} frames, the layers have {len(features.utterance)}; both must be "
                    "on one grid of frames (50 Hz)"
                )
            yield (name, inputs[name]), every


def _estimators(settings: AnalysisSettings, seed: int) -> dict[str, _Estimate]:
    """Return the estimators that the settings name, in a fixed order."""
    fresh, bounds, ksg = settings.mine_paper, settings.bounds, settings.ksg
    reused = replace(fresh, reuse_critic=True)
    utts, seeds, per_utterance = settings.mine_utterances, settings.mine_seeds, settings.per_utterance_utterances
    found: dict[str, _Estimate] = {
        "mine_paper": lambda *data: mine_paper_rows(*data, fresh, utts, seed, seeds),
        "mine_paper_reuse": lambda *data: mine_paper_rows(*data, reused, utts, seed, seeds),
        "bounds": lambda *data: held_out_rows(*data, bounds, seed),
        "ksg": lambda *data: ksg_rows(*data, ksg, seed),
    }
    chosen = {name: estimate for name, estimate in found.items() if name in settings.information}
    if per_utterance:
        chosen["per_utterance"] = lambda *data: per_utterance_rows(*data, bounds, per_utterance, seed)
    return chosen


def _flagged(
    rows: Sequence[LayerValue],
    features: LayerFeatures,
    layers: Sequence[int],
    settings: AnalysisSettings,
    per_utterance: bool,
) -> list[LayerValue]:
    """Flag values of fewer training frames than dimensions ``few_frames``, unless they have a flag already."""
    frames = len(features.utterance) // (len(features.utt_ids) if per_utterance else 1)
    few = _train_frames(frames, settings) < _dimensions(features.layers[layers[0]].shape[1], settings)
    return [replace(row, flag=row.flag or "few_frames") if few else row for row in rows]


def _train_frames(frames: int, settings: AnalysisSettings) -> int:
    return int(frames * (1.0 - settings.bounds.select_share - settings.bounds.held_out_share))


def _dimensions(width: int, settings: AnalysisSettings) -> int:
    components = settings.bounds.components if settings.bounds.whitening == "pca" else None
    return min(width, components or width)
