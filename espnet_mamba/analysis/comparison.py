"""Which layer of a system holds phones best, and whether one system beats another by more than chance.

The layer is chosen on the set that k-means was fitted on and reported on the other, so that the choice does not raise
the number that is reported. Differences are paired: both systems are resampled with the same utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espnet_mamba.analysis.purity import MEASURES, LayerCounts, quality_of_counts, resample_quality
from espnet_mamba.analysis.sampling import centred_interval


def compare_systems(layers: Sequence[LayerCounts], num_resamples: int, seed: int) -> dict[str, Any]:
    """Return the best layer of every system and the paired differences, for the largest K; smaller K under by_clusters.

    The top level holds phone purity of ``pretrained`` minus ``random`` (value, low, high) when both are there.
    """
    sizes = sorted({layer.num_clusters for layer in layers})
    by_clusters = {k: _compare([x for x in layers if x.num_clusters == k], num_resamples, seed) for k in sizes}
    return by_clusters[sizes[-1]] | {"by_clusters": {str(k): value for k, value in by_clusters.items()}}


def _compare(layers: Sequence[LayerCounts], num_resamples: int, seed: int) -> dict[str, Any]:
    best: dict[str, LayerCounts] = {}
    for layer in layers:
        if layer.system not in best or layer.fit_purity > best[layer.system].fit_purity:
            best[layer.system] = layer
    values = {system: quality_of_counts(layer.spoken().sum(0)[None])[0] for system, layer in best.items()}
    resampled = {system: resample_quality(layer.spoken(), num_resamples, seed) for system, layer in best.items()}
    result: dict[str, Any] = {"clusters": layers[0].num_clusters, "measure": MEASURES[0], "silence": "left out"}
    if {"pretrained", "random"} <= best.keys():
        result |= {"layer_pretrained": best["pretrained"].layer, "layer_random": best["random"].layer}
        result |= _with_interval(values, resampled, 0, "pretrained", "random")
    result["differences"] = {
        f"pretrained - {other}": {
            measure: _with_interval(values, resampled, column, "pretrained", other)
            for column, measure in enumerate(MEASURES)
        }
        for other in best
        if other != "pretrained" and "pretrained" in best
    }
    result["best_layers"] = {
        system: {"layer": layer.layer, "layer_name": layer.layer_name, "fit_purity": layer.fit_purity}
        | {measure: _with_interval(values, resampled, column, system) for column, measure in enumerate(MEASURES)}
        for system, layer in best.items()
    }
    return result


def _with_interval(
    values: dict[str, Any], resampled: dict[str, Any], column: int, system: str, other: str | None = None
) -> dict[str, float]:
    value, draws = values[system][column], resampled[system][:, column]
    if other is not None:
        value, draws = value - values[other][column], draws - resampled[other][:, column]
    low, high = centred_interval(float(value), draws)
    return {"value": float(value), "low": low, "high": high}
