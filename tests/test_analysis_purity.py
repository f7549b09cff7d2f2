"""Purity by hand on planted clusterings, its intervals, and the paired comparison of systems."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from espnet_mamba.analysis.comparison import compare_systems
from espnet_mamba.analysis.purity import (
    LayerCounts,
    count_layer,
    number_phones,
    phones_of_frames,
    purity_rows,
    quality_of_counts,
    resample_quality,
)
from espnet_mamba.analysis.sampling import bootstrap_weights, centred_interval, sample_names
from espnet_mamba.analysis.settings import PuritySettings
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.data.kaldi import Segment
from espnet_mamba.targets.quality import cluster_quality


def test_quality_by_hand():
    """Phone a: 3 frames in code 0, 1 in code 1; phone b: 2 in code 1, 2 in code 2."""
    counts = np.array([[[3.0, 1.0, 0.0], [0.0, 2.0, 2.0]]])
    purity, cluster_purity, pnmi = quality_of_counts(counts)[0]
    assert purity == pytest.approx((3 + 2 + 2) / 8)
    assert cluster_purity == pytest.approx((3 + 2) / 8)
    information = 3 / 8 * math.log(2) + 1 / 8 * math.log(2 / 3) + 2 / 8 * math.log(4 / 3) + 2 / 8 * math.log(2)
    assert pnmi == pytest.approx(information / math.log(2))


def test_quality_of_counts_agrees_with_targets():
    rng = np.random.default_rng(0)
    phones, codes = rng.integers(0, 7, 500), rng.integers(0, 11, 500)
    counts = np.zeros((1, 7, 11))
    np.add.at(counts[0], (phones, codes), 1)
    expected = cluster_quality(phones, codes, 11)
    assert quality_of_counts(counts)[0] == pytest.approx([expected.purity, expected.cluster_purity, expected.pnmi])


def planted(utts=8, frames=60, spread=0.05, seed=0):
    """Three phones with their own place each; phone "sil" takes a third of the frames."""
    generator = torch.Generator().manual_seed(seed)
    labels = ["sil", "a", "b", "c"]
    phones = torch.arange(frames).div(frames // 6, rounding_mode="floor") % 3
    phones = torch.where(torch.arange(frames) % 3 == 0, 0, phones + 1).repeat(utts)
    places = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    frames_of_all = places[phones] + spread * torch.randn(len(phones), 2, generator=generator)
    ids = [f"u{i}" for i in range(utts)]
    features = LayerFeatures(["layer0"], [frames_of_all], ids, torch.arange(utts).repeat_interleave(frames))
    segments = {
        utt_id: [Segment(0.02 * t + 0.005, 0.02 * t + 0.025, labels[phones[i * frames + t]]) for t in range(frames)]
        for i, utt_id in enumerate(ids)
    }
    return features, segments


def counted(spread, system="pretrained", clusters=3, seed=0):
    features, segments = planted(spread=spread, seed=seed)
    settings = PuritySettings(clusters=(clusters,), resamples=200)
    phones = phones_of_frames(features, segments, number_phones(segments, settings.silence), "phones.ctm")
    return count_layer(system, 0, clusters, (features, phones), (features, phones), settings, 0), settings


def test_planted_clusters_are_found_and_silence_left_out():
    layer, settings = counted(spread=0.05)
    rows = {(row.measure, row.reference): row for row in purity_rows(layer, settings, seed=0)}
    assert rows["phone_purity", "phones"].value == 1.0
    assert rows["pnmi", "phones"].value == pytest.approx(1.0)
    assert rows["phone_purity", "phones"].num_frames == 8 * 40
    assert rows["phone_purity", "phones_and_silence"].num_frames == 8 * 60
    assert rows["phone_purity", "phones_and_silence"].value < 1.0
    assert rows["phone_purity", "phones"].null < 0.6
    assert rows["used_clusters", "phones"].value == 3


def test_interval_holds_the_value_it_belongs_to():
    layer, settings = counted(spread=3.0, clusters=20)
    for row in purity_rows(layer, settings, seed=0):
        assert row.measure == "used_clusters" or row.low < row.value < row.high


def test_resampling_is_the_recount_of_repeated_utterances():
    counts = np.random.default_rng(1).integers(0, 9, (5, 4, 6)).astype(np.float32)
    weights = bootstrap_weights(5, 7, seed=3)
    expected = [quality_of_counts(np.repeat(counts, row, axis=0).sum(0)[None])[0] for row in weights]
    assert resample_quality(counts, 7, seed=3) == pytest.approx(np.stack(expected))


def test_utterance_without_phones_is_named():
    features, segments = planted()
    del segments["u3"]
    with pytest.raises(ValueError, match="test/phones.ctm: no phones for utterance 'u3'"):
        phones_of_frames(features, segments, {}, "test/phones.ctm")


def test_more_clusters_than_frames_are_refused():
    with pytest.raises(ValueError, match="1000 clusters but 320 spoken frames"):
        counted(spread=0.1, clusters=1000)


def test_comparison_chooses_on_the_fit_set_and_is_paired():
    good, _ = counted(spread=0.05, system="pretrained")
    bad, _ = counted(spread=4.0, system="random", seed=1)
    decoy = LayerCounts("pretrained", 1, "layer1", 3, fit_purity=0.1, counts=good.counts)
    found = compare_systems([good, decoy, bad], num_resamples=200, seed=0)
    assert (found["layer_pretrained"], found["layer_random"]) == (0, 0)
    gap = found["best_layers"]["pretrained"]["phone_purity"]["value"]
    gap -= found["best_layers"]["random"]["phone_purity"]["value"]
    assert found["value"] == pytest.approx(gap)
    assert 0.0 < found["low"] <= found["value"] <= found["high"]
    same = compare_systems([good, LayerCounts("random", 0, "layer0", 3, 1.0, good.counts)], 50, seed=0)
    assert (same["value"], same["low"], same["high"]) == (0.0, 0.0, 0.0)


def test_draws_hang_on_names_not_on_order():
    names = [f"utt{i}" for i in range(50)]
    assert sample_names(names, 7, seed=0) == sample_names(names[::-1], 7, seed=0)
    assert sample_names(names, 7, seed=0) != sample_names(names, 7, seed=1)
    assert set(sample_names(names, 5, seed=0)) < set(sample_names(names, 7, seed=0))


def test_centred_interval_moves_the_place_and_keeps_the_width():
    draws = np.linspace(0.5, 0.7, 201)
    low, high = centred_interval(0.3, draws)
    assert (low + high) / 2 == pytest.approx(0.3)
    assert high - low == pytest.approx(0.19)
