"""Decoders on data whose answer is known: planted maps, independent data, and what must not change a number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from espnet_mamba.analysis.reconstruction import (
    ReconstructionSettings,
    fit_ridge,
    joined,
    moments,
    reconstruction_rows,
    split_frames,
)
from espnet_mamba.analysis.statistics import LayerFeatures

SETTINGS = ReconstructionSettings(hidden=32, steps=150, batch_frames=128, seeds=2, resamples=200)


def features_of(layers, utts=20):
    """Cut (F, D) layers into utterances of unequal lengths."""
    frames = len(layers[0])
    sizes = torch.tensor([frames // utts + (-1) ** i * (i % 5) for i in range(utts)])
    sizes[-1] += frames - sizes.sum()
    owner = torch.arange(utts).repeat_interleave(sizes)
    return LayerFeatures([f"layer{i}" for i in range(len(layers))], layers, [f"u{i:02d}" for i in range(utts)], owner)


def measure(layers, target, settings=SETTINGS, seed=0, **options):
    features = features_of(layers, **options)
    rows = reconstruction_rows("model", features, ("logmel", target), range(len(layers)), settings, seed)
    return {(row.estimator, row.layer): row for row in rows}


def test_linear_map_is_read_back_whole_at_any_scale_and_offset():
    x = torch.randn(3000, 12)
    y = x @ torch.randn(12, 5) + 0.01 * torch.randn(3000, 5)
    rows = measure([x, 1e3 * x + 1e3, 1e-3 * x], 50.0 * y - 7.0)
    for row in rows.values():
        assert row.value == pytest.approx(1.0, abs=0.01) and row.low <= row.value <= row.high <= 1.0
        assert row.null < 0.05 and row.ceiling == 1.0 and row.unit == "R^2"
        assert row.num_utts == 6 and row.num_seeds == (1 if row.estimator == "ridge" else 2)


def test_known_noise_gives_its_share():
    x = torch.randn(6000, 6)
    y = x @ torch.linalg.qr(torch.randn(6, 6))[0] + torch.randn(6000, 6)  # half of the variance is noise
    row = measure([x], y)["ridge", 0]
    assert row.value == pytest.approx(0.5, abs=0.03) and row.low < 0.5 < row.high


def test_curved_map_is_for_the_mlp():
    x = torch.randn(6000, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].abs(), x[:, 3].square()], dim=1)
    rows = measure([x], y, replace(SETTINGS, steps=400, hidden=64))
    assert rows["ridge", 0].value < 0.05
    assert rows["mlp", 0].low > 0.7 > rows["ridge", 0].high


def test_independent_data_give_nothing():
    rows = measure([torch.randn(3000, 40), torch.randn(3000, 7)], torch.randn(3000, 5))
    for row in rows.values():
        assert row.value <= 0.0 + (row.high - row.low) and row.value > -0.1
        assert abs(row.null - row.value) < 0.05


def test_fewer_frames_than_dimensions_are_chosen_a_penalty_for():
    x = torch.randn(240, 400)
    rows = measure([x], torch.randn(240, 3), replace(SETTINGS, hidden=0), utts=12)
    assert set(rows) == {("ridge", 0)} and -0.5 < rows["ridge", 0].value < 0.2


def test_constant_dimensions_and_layers_change_nothing():
    x = torch.randn(2000, 5)
    y = x @ torch.randn(5, 3)
    wide = torch.cat([x, torch.full((2000, 2), 3.0)], dim=1)
    flat = torch.cat([y, torch.ones(2000, 1)], dim=1)
    rows = measure([x, wide, torch.zeros(2000, 4)], flat)
    assert rows["ridge", 1].value == pytest.approx(rows["ridge", 0].value, abs=1e-5)
    assert rows["ridge", 2].value == pytest.approx(0.0, abs=0.02)


def test_layers_do_not_see_each_other_and_storage_costs_little():
    x, other, wide = torch.randn(2000, 6), torch.randn(2000, 6), torch.randn(2000, 11)
    y = torch.tanh(x @ torch.randn(6, 4))
    alone, together, mixed = measure([x], y), measure([x, other], y), measure([x, wide], y)
    assert repr(measure([x], y)) == repr(alone)  # the same seed, the same digits
    assert repr(together["ridge", 0]) == repr(mixed["ridge", 0]) == repr(alone["ridge", 0])
    assert together["mlp", 0].value == pytest.approx(alone["mlp", 0].value, abs=1e-5)
    assert mixed["mlp", 0].value == pytest.approx(alone["mlp", 0].value, abs=0.02)
    assert measure([x.half()], y)["ridge", 0].value == pytest.approx(alone["ridge", 0].value, abs=1e-3)


def test_moments_are_those_of_the_frames():
    x, y = 1e4 + torch.randn(9000, 3).double(), torch.randn(9000, 2).double()
    frames = torch.arange(9000)[torch.arange(9000) % 3 > 0]
    found = moments(x, y, frames)
    covariance = torch.cov(torch.cat([x, y], dim=1)[frames].T, correction=0)
    torch.testing.assert_close(found.xx, covariance[:3, :3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.xy, covariance[:3, 3:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.var_y, covariance.diagonal()[3:], rtol=1e-9, atol=1e-9)
    assert found.count == 6000
    merged = joined(moments(x, y, frames[:2500]), moments(x, y, frames[2500:]))
    for name in ("mean_x", "mean_y", "xx", "xy", "var_y"):
        torch.testing.assert_close(getattr(merged, name), getattr(found, name), rtol=1e-9, atol=1e-9)


def test_penalty_is_the_best_of_those_on_the_select_part():
    x = torch.randn(300, 100)
    y = x[:, :1] + 3.0 * torch.randn(300, 1)
    train, select = torch.arange(150), torch.arange(150, 300)
    fit, check = moments(x, y, train), moments(x, y, select)
    scaled_x = (x[select] - fit.mean_x) / fit.spread_x()
    scaled_y = (y[select] - fit.mean_y) / fit.spread_y()
    errors = {
        penalty: float((scaled_y - scaled_x @ fit_ridge(fit, check, [penalty])).square().sum())
        for penalty in (1e-4, 1e-2, 1.0, 100.0)
    }
    best = min(errors, key=errors.get)
    torch.testing.assert_close(fit_ridge(fit, check, list(errors)), fit_ridge(fit, check, [best]))
    assert best >= 1.0


def test_split_hangs_on_names_and_keeps_utterances_whole():
    features = features_of([torch.randn(500, 2)])
    parts = split_frames(features, (0.2, 0.3), seed=0)
    owners = [set(features.utterance[part].tolist()) for part in parts]
    assert [len(owner) for owner in owners] == [10, 4, 6] and not (owners[0] & owners[1] | owners[1] & owners[2])
    assert sum(len(part) for part in parts) == 500
    again = split_frames(
        LayerFeatures(["x"], [torch.randn(500, 9)], features.utt_ids, features.utterance), (0.2, 0.3), 0
    )
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_bad_input_is_named():
    x, y = torch.randn(600, 3), torch.randn(600, 2)
    with pytest.raises(ValueError, match="model has 600 frames, logmel has 599; both must be on one grid"):
        measure([x], y[:-1])
    with pytest.raises(ValueError, match="logmel holds NaN"):
        measure([x], y.index_fill(0, torch.tensor([5]), torch.nan))
    with pytest.raises(ValueError, match="logmel is constant"):
        measure([x], torch.ones(600, 2))
    with pytest.raises(ValueError, match="5 utterances cannot be split"):
        measure([x], y, utts=5)
    with pytest.raises(ValueError, match="penalties"):
        ReconstructionSettings(penalties=(0.0,))
