"""Mutual information of every layer with layer 0 or log-mel: the published protocol and the held-out bounds as rows.

F frames, D width, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from espnet_mamba.analysis.bounds import Bound, BoundSettings, held_out_bounds, per_utterance_bounds
from espnet_mamba.analysis.mine import MinePaperSettings, UtterancePair, mine_paper
from espnet_mamba.analysis.sampling import bootstrap_weights, interval, sample_names
from espnet_mamba.analysis.splits import shuffled_null, stack_layers
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
    """Return one row per held-out estimator and layer, with the null of the same procedure on shuffled utterances.

    ``reference`` is (name, frames (F, Dx)). The null is trained with one seed: it is a line to look at, not a test.
    """
    name, x = reference
    y = stack_layers([features.layers[layer] for layer in layers])
    bounds = held_out_bounds(x, y, features.utterance, settings, seed)
    order = shuffled_null(features.utterance)
    null = held_out_bounds(x[order], y, features.utterance, replace(settings, seeds=1, resamples=1), seed)
    return _bound_rows(system, features, name, layers, settings, (bounds, null), "")


def per_utterance_rows(
    system: str,
    features: LayerFeatures,
    reference: tuple[str, Tensor],
    layers: Sequence[int],
    settings: BoundSettings,
    num_utterances: int,
    seed: int,
) -> list[LayerValue]:
    """Return rows as :func:`held_out_rows`, of ``num_utterances`` utterances each measured alone, and averaged.

    The paper's average, held out. The estimators' names end in ``_per_utterance``. No row, and a line that says so,
    when no utterance is long enough.
    """
    name, x = reference
    needed = 6 * settings.block_frames
    long_enough = [utt_id for utt_id, size in zip(features.utt_ids, features.sizes, strict=True) if size >= needed]
    if not long_enough:
        print(f"{system}: no utterance has {needed} frames, mutual information per utterance is left out", flush=True)
        return []
    chosen = sample_names(long_enough, num_utterances, seed)
    indices = [features.utt_ids.index(utt_id) for utt_id in chosen]
    found = []
    for order in (features.utterance.new_zeros(0), shuffled_null(features.utterance)):
        pairs = _pairs(features, x, layers, indices, order)
        short = replace(settings, seeds=1, resamples=1) if len(order) else settings
        found.append(per_utterance_bounds(chosen, [p.x for p in pairs], [p.y for p in pairs], short, seed))
    return _bound_rows(system, features, name, layers, settings, (found[0], found[1]), "_per_utterance")


def _bound_rows(
    system: str,
    features: LayerFeatures,
    reference: str,
    layers: Sequence[int],
    settings: BoundSettings,
    found: tuple[dict[str, list[Bound]], dict[str, list[Bound]]],
    suffix: str,
) -> list[LayerValue]:
    bounds, null = found
    return [
        LayerValue(
            system=system,
            layer=layer,
            layer_name=features.names[layer],
            measure=MEASURE,
            estimator=estimator + suffix,
            reference=reference,
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
            flag=bound.flag,
        )
        for estimator in settings.estimators
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
    num_seeds: int = 1,
) -> list[LayerValue]:
    """Return one row per layer by the published protocol: the mean over utterances that fill a minibatch.

    It is run ``num_seeds`` times, published once. ``null`` is one run of the same protocol with the layer's frames
    taken from another utterance, ``ceiling`` the mean of ln N.
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
    runs = np.stack([mine_paper(pairs, settings, seed + run).double().numpy() for run in range(num_seeds)])
    values, by_run = runs.mean(0), runs.mean(1)
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
                num_seeds=num_seeds,
                seed_sd=float(by_run[:, column].std(ddof=1)) if num_seeds > 1 else float("nan"),
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
        UtterancePair(features.utt_ids[index], reference[index], stack_layers([layer[index] for layer in cut]))
        for index in chosen
    ]
