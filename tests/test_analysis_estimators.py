"""Every estimator of information on data whose answer is known: Gaussians, planted codes. F frames, D width."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from espnet_mamba.analysis.bounds import ESTIMATORS, BoundSettings, at_ceiling, held_out_bounds, per_utterance_bounds
from espnet_mamba.analysis.critics import GaussianScore
from espnet_mamba.analysis.discrete_information import (
    DiscreteSettings,
    count_pairs,
    discrete_rows,
    information_of_counts,
    null_information,
    utterance_labels,
)
from espnet_mamba.analysis.ksg import KsgSettings, ksg, ksg_rows, ksg_values
from espnet_mamba.analysis.mutual_information import per_utterance_rows
from espnet_mamba.analysis.splits import blocks_of, permuted_utterances
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.whitening import fit_scaler

TRUTHS = (0.0, 0.5, 2.0, 5.0)
FAST = BoundSettings(
    steps=60, batch_frames=128, check_every=30, check_frames=500, held_out_frames=1200, seeds=2, resamples=200
)
NEAREST = KsgSettings(held_out_frames=1500)


def gaussians(dim, truths=TRUTHS, frames=12000, utts=40, seed=1):
    """Return x (F, D), one layer per truth (L, F, D) with that many nats in common, and whose frame each is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(frames, dim, generator=generator)
    layers = []
    for nats in truths:
        rho = math.sqrt(1.0 - math.exp(-2.0 * nats / dim))
        layers.append(rho * x + math.sqrt(1.0 - rho**2) * torch.randn(frames, dim, generator=generator))
    return x, torch.stack(layers), torch.arange(frames) // (frames // utts)


def holds(found, nats):
    """Within 10 %, or flagged; independent data at most 0.05 nats."""
    return found.value <= 0.05 if nats == 0.0 else bool(found.flag) or found.value == pytest.approx(nats, rel=0.1)


@pytest.fixture(scope="module", params=[1, 20])
def gaussian_bounds(request):
    return request.param, held_out_bounds(*gaussians(request.param), FAST)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gaussians_within_10_percent_or_flagged(gaussian_bounds, estimator):
    dim, bounds = gaussian_bounds
    for bound, nats in zip(bounds[estimator], TRUTHS, strict=True):
        assert holds(bound, nats), (dim, estimator, nats, bound)
        # What is reachable must be reached: a flag is an excuse at 5 nats in 20 dimensions alone.
        assert dim == 20 and nats in (0.0, 5.0) or nats == 0.0 or not bound.flag or bound.flag == "few_frames"


def test_bounds_at_768_dimensions_say_that_frames_are_few():
    short = replace(FAST, steps=4, check_every=4, seeds=1, check_frames=200, held_out_frames=400)
    bounds = held_out_bounds(*gaussians(768, (0.0, 5.0), frames=2400), short)
    for estimator in ESTIMATORS:
        assert all(holds(bound, nats) for bound, nats in zip(bounds[estimator], (0.0, 5.0), strict=True)), estimator
        assert {bound.flag for bound in bounds[estimator]} == {"few_frames"}
    few = ksg_values(*gaussians(768, (0.0, 5.0), frames=1500), replace(NEAREST, held_out_frames=600))
    assert {value.flag for value in few} == {"components"} and few[0].value <= 0.1


def test_what_is_not_gaussian_is_found():
    """y = |x| + noise has no correlation with x; the truth by numerical integration is 1.08 nats. Bounds stay below."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12000, 1, generator=generator)
    y = x.abs() + 0.2 * torch.randn(12000, 1, generator=generator)
    utts, truth = torch.arange(12000) // 300, _numerical_information(np.abs, 0.2)
    bounds = held_out_bounds(x, y[None], utts, replace(FAST, steps=400, learning_rate=5e-3, seeds=1))
    least = {"dv_heldout": 0.6, "infonce_heldout": 0.85, "smile_heldout": 0.8, "nwj_heldout": 0.4}
    for estimator in ESTIMATORS:
        assert least[estimator] * truth < bounds[estimator][0].value < 1.05 * truth, estimator
    assert ksg_values(x, y[None], utts, NEAREST)[0].value == pytest.approx(truth, rel=0.15)


def _numerical_information(mean, noise):
    """I(x; y) for x standard normal and y = mean(x) + noise: H(y) - H(noise)."""
    x, y = np.linspace(-8, 8, 4001), np.linspace(-3, 10, 4001)
    weight = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    density = np.exp(-((y[:, None] - mean(x)[None]) ** 2) / (2 * noise**2)) @ weight / math.sqrt(2 * math.pi) / noise
    entropy = -np.sum(density * np.log(np.maximum(density, 1e-300))) * (y[1] - y[0])
    return entropy - 0.5 * math.log(2 * math.pi * math.e * noise**2)


@pytest.mark.parametrize(("factor_x", "factor_y"), [(1e-2, 1.0), (1.0, 1e3), (1e3, 1e-2)])
def test_scale_of_either_side_changes_nothing(factor_x, factor_y):
    x, y, utts = gaussians(4, (1.0,), frames=4000)
    short = replace(FAST, steps=20, seeds=1)
    plain, scaled = (held_out_bounds(*sides, utts, short) for sides in ((x, y), (x * factor_x - 3.0, y * factor_y)))
    for estimator in ESTIMATORS:
        assert plain[estimator][0].low <= scaled[estimator][0].value <= plain[estimator][0].high
        assert scaled[estimator][0].value == pytest.approx(plain[estimator][0].value, abs=0.02)
    near, scaled = (ksg_values(*sides, utts, NEAREST)[0] for sides in ((x, y), (x * factor_x - 3.0, y * factor_y)))
    assert scaled.value == pytest.approx(near.value, abs=1e-3)


def test_processing_loses_information():
    """x -> y -> z: z knows no more of x than y does; so for a chain of noisier and noisier layers."""
    generator = torch.Generator().manual_seed(2)
    layers = [torch.randn(8000, 3, generator=generator)]
    for _ in range(4):
        layers.append(layers[-1] + 0.7 * torch.randn(8000, 3, generator=generator))
    utts = torch.arange(8000) // 200
    bounds = held_out_bounds(layers[0], torch.stack(layers[1:]), utts, FAST)
    near = ksg_values(layers[0], torch.stack(layers[1:]), utts, NEAREST)
    for values in [*bounds.values(), near]:
        falling = [value.value for value in values]
        assert falling == sorted(falling, reverse=True)


def test_pca_whitening_keeps_the_answer_and_drops_what_has_no_variance():
    x, y, utts = gaussians(3, (1.0,), frames=6000)
    wide = torch.cat([x, x @ torch.randn(3, 5), torch.full((6000, 1), 7.0)], 1)  # rank 3 in 9 columns
    settings = replace(FAST, steps=20, whitening="pca")
    bounds = held_out_bounds(wide, y, utts, settings)
    for estimator in ESTIMATORS:
        assert bounds[estimator][0].value == pytest.approx(1.0, rel=0.1)
    scaled = fit_scaler(wide, "pca")(wide)
    assert scaled.shape == (6000, 3)
    assert torch.allclose(scaled.T @ scaled / 5999, torch.eye(3), atol=1e-3)
    assert fit_scaler(wide[:3], "pca")(wide).shape[1] == 2  # fewer frames than dimensions: what they span
    assert fit_scaler(wide[:, 8:], "pca")(wide[:, 8:]).abs().max() == 0.0
    with pytest.raises(ValueError, match="'zca' is not one of: standardise pca"):
        fit_scaler(wide, "zca")


def test_gaussian_score_is_the_log_ratio_of_densities():
    x, y, utts = gaussians(2, (1.0,), frames=20000)
    x, y = fit_scaler(x)(x), fit_scaler(y[0])(y[0])
    left, right = GaussianScore.fit(x, y, utts).towers(x[:50], y[:50], 4)
    both = torch.cat([x, y], 1)
    densities = [
        torch.distributions.MultivariateNormal(torch.zeros(side.shape[1]), side.T @ side / 20000)
        for side in (both, x, y)
    ]
    expected = densities[0].log_prob(torch.cat([x[:50], y[:50]], 1))
    expected = expected - densities[1].log_prob(x[:50]) - densities[2].log_prob(y[:50])
    assert torch.allclose((left * right).sum(1), expected, atol=0.1)
    assert GaussianScore.fit(x, y.roll(1, 0), utts).honest < 0.001


def test_truth_above_what_the_frames_can_show_is_flagged():
    x, _, utts = gaussians(8, (0.0,), frames=2000)
    short = replace(FAST, steps=10, check_every=10, seeds=1)
    for estimator, bounds in held_out_bounds(x, x[None].clone(), utts, short).items():
        assert bounds[0].value <= bounds[0].ceiling and bounds[0].flag == "ceiling", estimator
    near = ksg_values(x[:, :1], x[None, :, :1].clone(), utts, NEAREST)[0]
    assert near.flag == "ceiling" and near.value <= near.ceiling + 1e-9
    assert at_ceiling(7.0, 7.0) and not at_ceiling(3.0, 7.0)


def test_constant_features_know_nothing():
    x, y, utts = gaussians(3, (1.0,), frames=2000)
    short = replace(FAST, steps=10, check_every=10, seeds=1)
    for sides in ((torch.full_like(x, 2.0), y), (x, torch.full_like(y, -1.0))):
        for estimator, bounds in held_out_bounds(*sides, utts, short).items():
            assert abs(bounds[0].value) < 0.05, estimator
        assert abs(ksg_values(*sides, utts, NEAREST)[0].value) < 0.05
        with_pca = held_out_bounds(*sides, utts, replace(short, whitening="pca", components=2))
        assert all(abs(bounds[0].value) < 0.05 for bounds in with_pca.values())


def test_estimators_alone_or_together_agree():
    x, y, utts = gaussians(3, (1.0,), frames=2000)
    together = held_out_bounds(x, y, utts, FAST)
    for estimator in ESTIMATORS:
        alone = held_out_bounds(x, y, utts, replace(FAST, estimators=(estimator,)))
        assert list(alone) == [estimator]
        assert alone[estimator][0].value == pytest.approx(together[estimator][0].value, abs=1e-3)
    with pytest.raises(ValueError, match="'mine' is not one of: dv_heldout"):
        replace(FAST, estimators=("mine",))


def cut(x, y, frames):
    count = len(x) // frames
    return [f"u{i}" for i in range(count)], list(x.split(frames)), [part.contiguous() for part in y.split(frames, 1)]


def test_per_utterance_average():
    names, x, y = cut(*gaussians(2, (0.0, 1.0), frames=2400)[:2], 400)
    short = replace(FAST, steps=20, check_every=20, guard_frames=1)
    bounds = per_utterance_bounds(names, x, y, short)
    chunked = per_utterance_bounds(names, x, y, replace(short, critics_at_once=40))
    for estimator in ESTIMATORS:
        zero, one = bounds[estimator]
        assert zero.value <= 0.05 and one.value == pytest.approx(1.0, abs=0.2) and one.num_utts == 6
        assert one.low < one.value < one.high < one.ceiling
        assert chunked[estimator][1].value == pytest.approx(one.value, abs=1e-4)
    with pytest.raises(ValueError, match="none has 150 frames"):
        per_utterance_bounds(names, [part[:100] for part in x], [part[:, :100] for part in y], short)


def test_blocks_leave_out_their_borders():
    frames, block = blocks_of(52, 25, 2)
    assert len(frames) == 42 and frames[0] == 2 and frames[21] == 27 and block.tolist() == [0] * 21 + [1] * 21


def test_per_utterance_rows_and_none_when_all_are_short(capsys):
    x, y, utts = gaussians(2, (1.0,), frames=1600, utts=8)
    features = LayerFeatures(["layer0", "layer1"], [x, y[0]], [f"u{i}" for i in range(8)], utts)
    short = replace(FAST, steps=4, check_every=4, seeds=5)
    rows = per_utterance_rows("random", features, ("layer0", x), [1], short, 3, seed=0)
    assert [row.estimator for row in rows] == [f"{name}_per_utterance" for name in ESTIMATORS]
    assert all(row.num_utts == 3 and row.num_seeds == 5 and row.null < 0.2 < row.value for row in rows)
    assert per_utterance_rows("random", features, ("layer0", x), [1], replace(short, block_frames=50), 3, seed=0) == []
    assert "no utterance has 300 frames" in capsys.readouterr().out


@pytest.mark.parametrize("dim", [1, 20])
def test_nearest_neighbours_within_10_percent_or_flagged(dim):
    x, y, utts = gaussians(dim)
    values = ksg_values(x, y, utts, replace(NEAREST, components=dim, held_out_frames=3000))
    for value, nats in zip(values, TRUTHS, strict=True):
        assert holds(value, nats), value
        assert dim == 20 or not value.flag
        # The Gaussian twin has noise of its own; where the bias is large it tells it.
        assert value.value - value.bias == pytest.approx(nats, abs=max(0.1, 0.15 * nats))


def test_nearest_neighbours_by_hand():
    """Four frames of four utterances, one neighbour. Frame 0 at (0, 0): nearest is frame 1 at (1, 3), 3 away; within
    less than 3 are frames 1 and 2 in x, none in y."""
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    y = torch.tensor([[[0.0], [3.0], [-8.0], [20.0]]])
    harmonic = {1: 0.0, 3: 1.5, 4: 1 + 1 / 2 + 1 / 3}  # digamma(n) without Euler's constant
    expected = harmonic[1] + harmonic[4] - harmonic[3] - harmonic[1]
    assert ksg(x, y, torch.arange(4), 1)[0, 0] == pytest.approx(expected)
    with pytest.raises(ValueError, match="2 frames of other utterances, 3 neighbours"):
        ksg(x, y, torch.tensor([0, 0, 1, 1]), 3)


def test_frames_of_the_same_utterance_are_no_neighbours():
    """Each frame ten times over: without the rule every copy would be a neighbour, and chance a law."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(300, 2, generator=generator).repeat_interleave(10, 0) for _ in range(2))
    x, y = (side + 1e-3 * torch.randn(3000, 2, generator=generator) for side in (x, y))
    assert ksg(x, y[None], torch.arange(3000) // 10, 3).mean() < 0.05
    assert ksg(x, y[None], torch.arange(3000), 3).mean() > 2.0


def test_nearest_neighbour_rows():
    x, y, utts = gaussians(2, (1.0,), frames=3000, utts=12)
    features = LayerFeatures(["layer0", "layer1"], [x, y[0]], [f"u{i}" for i in range(12)], utts)
    value, bias = ksg_rows("fbank", features, ("layer0", x), [1], replace(NEAREST, components=2), seed=0)
    assert value.estimator == bias.estimator == "ksg2" and bias.measure == "mutual_information_bias"
    assert value.low < value.value < value.high < value.ceiling and abs(value.null) < 0.1


def test_discrete_information_by_hand():
    """Labels a: 3 frames in code 0, 1 in code 1; b: 2 in code 1, 2 in code 2."""
    counts = np.array([[[3.0, 1.0, 0.0], [0.0, 2.0, 2.0]], [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]], np.ones((2, 3))])
    plugin, corrected, labels, codes = information_of_counts(counts).T
    expected = 3 / 8 * math.log(2) + 1 / 8 * math.log(2 / 3) + 2 / 8 * math.log(4 / 3) + 2 / 8 * math.log(2)
    assert plugin == pytest.approx([expected, math.log(2), 0.0])
    # used cells - rows - columns + 1 = 4 - 2 - 3 + 1, 2 - 2 - 2 + 1, 6 - 2 - 3 + 1; over twice the frames
    assert corrected - plugin == pytest.approx([0.0, 1 / 16, -2 / 12])
    assert labels == pytest.approx([math.log(2)] * 3) and codes[2] == pytest.approx(math.log(3))
    assert np.isnan(information_of_counts(np.zeros((1, 2, 3)))).all()


def test_correction_takes_the_bias_off():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(20):
        labels, codes = rng.integers(0, 20, 4000), rng.integers(0, 30, 4000)
        found.append(information_of_counts(count_pairs(labels, codes, np.zeros(4000, int), (1, 20, 30)))[0, :2])
    plugin, corrected = np.mean(found, 0)
    assert plugin > 0.06 and abs(corrected) < 0.005


def planted(utts=20, frames=100):
    """Frames at one of four places by phone, shifted a little by the utterance's speaker (two in turn)."""
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(utts).repeat_interleave(frames)
    phones = torch.randint(4, (utts * frames,), generator=generator)
    places = torch.stack([phones % 2, phones // 2], 1) * 5.0
    noise = 0.1 * torch.randn(utts * frames, 2, generator=generator)
    ids = [f"u{i:02d}" for i in range(utts)]
    return LayerFeatures(["layer0"], [places + noise], ids, owner), phones.numpy()


def test_planted_codes_know_phones_and_not_speakers():
    features, phones = planted()
    phones[:10] = -1  # silence
    speakers = utterance_labels(features, {utt_id: utt_id[-1:] for utt_id in features.utt_ids}, "utt2spk")
    labels = {"phones": phones, "speakers": speakers}
    settings = DiscreteSettings(clusters=(4,), shuffles=4, resamples=100)
    rows = {
        (row.reference, row.estimator, row.unit): row for row in discrete_rows("x", features, labels, [0], settings, 0)
    }
    assert len(rows) == 8
    known = rows["phones", "kmeans4_plugin", "share of H"]
    assert known.value == pytest.approx(1.0) and known.ceiling == pytest.approx(1.0) and known.null < 0.01
    assert known.num_frames == 1990
    assert abs(rows["speakers", "kmeans4_miller_madow", "nats"].value) < 0.01
    assert rows["speakers", "kmeans4_plugin", "nats"].value > rows["speakers", "kmeans4_miller_madow", "nats"].value
    with pytest.raises(ValueError, match="utt2spk: no label for utterance 'u00'"):
        utterance_labels(features, {}, "utt2spk")


def test_null_moves_labels_with_their_utterance():
    """Codes that are constant within an utterance know a speaker by chance; freely shuffled frames would hide that."""
    utterance = torch.arange(6).repeat_interleave(50)
    codes = speakers = utterance.numpy()
    moved = null_information(speakers, codes, utterance, (6, 6, 6), 3, seed=0)
    assert moved[0] == pytest.approx(math.log(6))
    order = permuted_utterances(utterance, torch.Generator().manual_seed(0))
    assert (utterance[order] != utterance).all()


@pytest.mark.slow
def test_interval_covers_the_truth_in_18_of_20_seeds():
    settings = replace(FAST, steps=20, check_every=20, seeds=1, held_out_frames=1500, held_out_share=0.5)
    covered = dict.fromkeys((*ESTIMATORS, "ksg"), 0)
    for seed in range(20):
        x, y, utts = gaussians(2, (1.0,), frames=6000, seed=seed)
        found = {name: values[0] for name, values in held_out_bounds(x, y, utts, settings, seed).items()}
        found["ksg"] = ksg_values(x, y, utts, replace(NEAREST, components=2), seed)[0]
        for name, value in found.items():
            covered[name] += value.low <= 1.0 <= value.high
    print(covered)
    assert min(covered.values()) >= 18, covered
