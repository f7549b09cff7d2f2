"""Mutual information of every layer with layer 0 or log-mel: the published protocol and the held-out bounds as rows.

F frames, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.analysis.bounds import ESTIMATORS, BoundSettings, held_out_bounds
from espnet_mamba.analysis.mine import MinePaperSettings, UtterancePair, mine_paper
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, sample_names
from espnet_mamba.analysis.splits import shuffled_null
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue

MEASURE = "mutual_information"


def held_out_rows(
    system: str,
    features: LayerFeatures,
    reference: tuple[str, Tensor],
    layers: Sequence[int],
    settings: BoundSettings,
    seed: int,
) -> list[LayerValue]:
    """Return one row per held-out bound and layer, with the null of the same procedure on shuffled utterances.

    ``reference`` is (name, frames (F, Dx)). The null is trained with one seed: it is a line to look at, not a test.
    """
    name, x = reference
    y = _stack([features.layers[layer] for layer in layers])
    bounds = held_out_bounds(x, y, features.utterance, settings, seed)
    order = shuffled_null(features.utterance)
    null = held_out_bounds(x[order], y, features.utterance, replace(settings, seeds=1, resamples=1), seed)
    return [
        LayerValue(
            system=system,
            layer=layer,
            layer_name=features.names[layer],
            measure=MEASURE,
            estimator=estimator,
            reference=name,
            value=bound.value,
            low=bound.low,
            high=bound.high,
            null=null[estimator][index].value,
            ceiling=bound.ceiling,
            unit="nats",
            num_frames=bound.num_frames,
            num_utts=bound.num_utts,
            num_seeds=settings.seeds,
            seed_sd=bound.seed_sd,
        )
        for estimator in ESTIMATORS
        for index, (layer, bound) in enumerate(zip(layers, bounds[estimator], strict=True))
    ]


def mine_paper_rows(
    system: str,
    features: LayerFeatures,
    reference: tuple[str, Tensor],
    layers: Sequence[int],
    settings: MinePaperSettings,
    num_utterances: int,
    seed: int,
) -> list[LayerValue]:
    """Return one row per layer by the published protocol: the mean over utterances that fill a minibatch.

    ``null`` is the same protocol with the layer's frames taken from another utterance, ``ceiling`` the mean of ln N.
    No row when no utterance is long enough (the protocol would train nothing on them).
    """
    name, x = reference
    sizes = features.sizes
    long_enough = [utt_id for utt_id, size in zip(features.utt_ids, sizes, strict=True) if size >= settings.minibatch]
    if not long_enough:
        print(
            f"mine_paper: no utterance has {settings.minibatch} frames (one minibatch), {system} is left out",
            flush=True,
        )
        return []
    chosen = [features.utt_ids.index(utt_id) for utt_id in sample_names(long_enough, num_utterances, seed)]
    pairs = _pairs(features, x, layers, chosen, features.utterance.new_zeros(0))
    null_pairs = _pairs(features, x, layers, chosen, shuffled_null(features.utterance))
    values = mine_paper(pairs, settings, seed).double().numpy()
    null = mine_paper(null_pairs, settings, seed).mean(0)
    weights = bootstrap_weights(len(chosen), 1000, seed) / len(chosen)
    resampled = weights @ values
    ceiling = float(np.mean([math.log(sizes[index]) for index in chosen]))
    rows = []
    for column, layer in enumerate(layers):
        low, high = interval(resampled[:, column])
        rows.append(
            LayerValue(
                system=system,
                layer=layer,
                layer_name=features.names[layer],
                measure=MEASURE,
                estimator="mine_paper_reuse" if settings.reuse_critic else "mine_paper",
                reference=name,
                value=float(values[:, column].mean()),
                low=low,
                high=high,
                null=float(null[column]),
                ceiling=ceiling,
                unit="nats",
                num_frames=sum(sizes[index] for index in chosen),
                num_utts=len(chosen),
            )
        )
    return rows


def _pairs(
    features: LayerFeatures, x: Tensor, layers: Sequence[int], chosen: Sequence[int], order: Tensor
) -> list[UtterancePair]:
    """Cut the chosen utterances; ``order`` (F,) takes the reference from elsewhere, empty for the true pairs."""
    reference = (x[order] if len(order) else x).float().split(features.sizes)
    cut = [features.of_utterance(layer) for layer in layers]
    return [
        UtterancePair(features.utt_ids[index], reference[index], _stack([layer[index] for layer in cut]))
        for index in chosen
    ]


def _stack(layers: Sequence[Tensor]) -> Tensor:
    """Stack layers (F, D_l) of any widths to (L, F, D), narrower ones filled with zeros, which carry nothing."""
    width = max(layer.shape[1] for layer in layers)
    return torch.stack([F.pad(layer.float(), (0, width - layer.shape[1])) for layer in layers])
