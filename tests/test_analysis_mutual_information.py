"""Mutual information on data whose answer is known: Gaussians, independent noise, scaled copies. F frames, D width."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from espnet_mamba.analysis.bounds import ESTIMATORS, BoundSettings, held_out_bounds
from espnet_mamba.analysis.mine import MinePaperSettings
from espnet_mamba.analysis.mutual_information import held_out_rows, mine_paper_rows
from espnet_mamba.analysis.splits import shuffled_null, split_by_utterance
from espnet_mamba.analysis.statistics import LayerFeatures

FAST = BoundSettings(steps=100, batch_frames=192, check_frames=600, held_out_frames=1500, seeds=2, resamples=200)


def gaussian(dim, nats, frames=20000, utts=40, seed=1):
    """Return x, y (F, D) whose mutual information is ``nats``, and the utterance of each frame."""
    generator = torch.Generator().manual_seed(seed)
    rho = math.sqrt(1.0 - math.exp(-2.0 * nats / dim))
    x = torch.randn(frames, dim, generator=generator)
    y = rho * x + math.sqrt(1.0 - rho**2) * torch.randn(frames, dim, generator=generator)
    return x, y, torch.arange(frames) // (frames // utts)


@pytest.fixture(scope="module", params=[1, 20])
def gaussian_bounds(request):
    """Bounds of 0, 0.5 and 2 nats at once: three "layers" of one reference."""
    data = [gaussian(request.param, nats) for nats in (0.0, 0.5, 2.0)]
    return held_out_bounds(data[0][0], torch.stack([y for _, y, _ in data]), data[0][2], FAST)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("layer", "nats"), [(1, 0.5), (2, 2.0)])
def test_gaussians_within_10_percent(gaussian_bounds, estimator, layer, nats):
    bound = gaussian_bounds[estimator][layer]
    assert bound.value == pytest.approx(nats, rel=0.1)
    assert bound.low <= bound.value <= bound.high < bound.ceiling


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_independent_data_gets_nothing(gaussian_bounds, estimator):
    assert abs(gaussian_bounds[estimator][0].value) <= 0.05


def test_scale_of_either_side_changes_nothing():
    x, y, utts = gaussian(4, 1.0, frames=4000)
    short = replace(FAST, steps=60, seeds=1)
    plain = held_out_bounds(x, y[None], utts, short)
    scaled = held_out_bounds(x * 1e-2 + 5.0, torch.stack([y * 1e3]), utts, short)
    for estimator in ESTIMATORS:
        assert scaled[estimator][0].value == pytest.approx(plain[estimator][0].value, abs=0.02)


def test_bound_stays_below_its_ceiling_when_the_truth_is_infinite():
    x, _, utts = gaussian(8, 0.0, frames=4000)
    bounds = held_out_bounds(x, x[None].clone(), utts, replace(FAST, seeds=1))
    for estimator in ESTIMATORS:
        assert 2.0 < bounds[estimator][0].value <= bounds[estimator][0].ceiling


def test_layers_estimated_together_or_alone_agree():
    x, y, utts = gaussian(3, 1.0, frames=2000)
    short = replace(FAST, steps=40)
    together = held_out_bounds(x, torch.stack([y, y.flip(1)]), utts, short)
    alone = held_out_bounds(x, y[None], utts, short)
    again = held_out_bounds(x, y[None], utts, short)
    other = held_out_bounds(x, y[None], utts, short, seed=1)
    for estimator in ESTIMATORS:
        assert alone[estimator] == again[estimator]
        assert together[estimator][0].value == pytest.approx(alone[estimator][0].value, abs=1e-3)
        assert other[estimator][0].value != alone[estimator][0].value


def test_split_is_by_utterance_and_standardised_by_train_alone():
    x, y, utts = gaussian(2, 1.0, frames=1000, utts=10)
    parts = split_by_utterance(x * 7.0 + 3.0, y[None], utts, (0.2, 0.3), (999, 999), seed=0)
    assert [part.num_utts for part in parts] == [5, 2, 3]
    assert torch.allclose(parts[0].x.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(parts[0].x.std(0), torch.ones(2), atol=1e-5)
    rows = torch.cat([part.y[0] for part in parts])
    assert len(torch.unique(rows, dim=0)) == 1000  # every frame in one part


def test_constant_dimension_is_left_out_and_nan_is_named():
    x, y, utts = gaussian(2, 1.0, frames=1000, utts=10)
    x[:, 1] = 4.0
    assert torch.equal(split_by_utterance(x, y[None], utts, (0.2, 0.3), (99, 99), 0)[0].x[:, 1], torch.zeros(500))
    y[3, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 0.*1 of 1000 frames"):
        held_out_bounds(x, y[None], utts, FAST)
    with pytest.raises(ValueError, match="at least 6"):
        held_out_bounds(x, y.nan_to_num()[None], utts // 2, FAST)


def test_null_pairs_every_frame_with_another_utterance():
    utts = torch.tensor([0] * 5 + [1] * 3 + [2] * 4)
    order = shuffled_null(utts)
    assert (utts[order] != utts).all()
    assert order[:5].tolist() == [5, 6, 7, 5, 6]


def layer_features(utts=12, frames=90):
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(utts * frames, 4, generator=generator)
    noisy = base + torch.randn(utts * frames, 4, generator=generator)
    wide = torch.cat([base, base], dim=1)
    ids = torch.arange(utts).repeat_interleave(frames)
    return LayerFeatures(["layer0", "layer1", "layer2"], [base, noisy, wide], [f"u{i}" for i in range(utts)], ids)


def test_rows_say_what_was_measured():
    features = layer_features()
    reference = ("layer0", features.layers[0])
    rows = held_out_rows("pretrained", features, reference, [1, 2], replace(FAST, steps=40, seeds=2), seed=0)
    assert [(row.estimator, row.layer_name) for row in rows] == [
        (estimator, layer) for estimator in ESTIMATORS for layer in ("layer1", "layer2")
    ]
    for row in rows:
        assert row.unit == "nats" and row.num_seeds == 2 and row.seed_sd >= 0.0
        assert row.null < 0.1 < row.value <= row.ceiling


def test_short_utterances_are_left_out_of_the_published_protocol(capsys):
    features = layer_features(utts=3)
    settings, reference = MinePaperSettings(epochs=2, minibatch=64), ("layer0", features.layers[0])
    rows = mine_paper_rows("random", features, reference, [1, 2], settings, 2, seed=0)
    assert [row.num_utts for row in rows] == [2, 2]
    assert rows[0].ceiling == pytest.approx(math.log(90))
    assert mine_paper_rows("random", features, reference, [1], MinePaperSettings(), 2, seed=0) == []
    assert "no utterance has 128 frames" in capsys.readouterr().out
