"""Linear probes on planted classes: found whole when apart, at chance when unrelated, whatever the order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from espnet_mamba.analysis.probes import ProbeSettings, _Covariance, _OneHot, _Task, phone_rows, speaker_rows
from espnet_mamba.analysis.reconstruction import moments
from espnet_mamba.analysis.statistics import LayerFeatures

SETTINGS = ProbeSettings(resamples=200, null_draws=3)


def corpus(distance, utts=24, frames=60, width=6, phones=4, seed=0):
    """Frames of Gaussian phones around their own places, each lasting 3 frames; phone 0 is silence."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(phones + 1, (utts * frames // 3,), generator=generator)
    labels = drawn.repeat_interleave(3)
    places = distance * torch.randn(phones + 1, width, generator=generator)
    x = places[labels] + torch.randn(len(labels), width, generator=generator)
    ids = [f"s{i % 4}-u{i:02d}" for i in range(utts)]
    order = sorted(range(utts), key=lambda i: ids[i])
    index = torch.cat([torch.arange(frames) + i * frames for i in order])
    owner = torch.arange(utts).repeat_interleave(frames)
    return LayerFeatures(["layer0"], [x[index]], sorted(ids), owner), labels[index].numpy()


def by_estimator(rows):
    return {row.estimator: row for row in rows}


def test_phones_that_lie_apart_are_all_found():
    features, phones = corpus(distance=10.0)
    rows = by_estimator(phone_rows("model", features, phones, [0], SETTINGS, seed=0))
    probe = rows["lda"]
    assert (probe.value, probe.low, probe.high, probe.ceiling) == (1.0, 1.0, 1.0, 1.0)
    assert (probe.measure, probe.reference, probe.unit) == ("phone_accuracy", "phones", "fraction")
    assert probe.num_utts == 7 and probe.num_frames < 7 * 60  # of silence none
    assert probe.null < 0.45 and 0.1 < rows["majority"].value < 0.4
    with_silence = phone_rows("model", features, phones, [0], SETTINGS, seed=0, silence=None)[0]
    assert with_silence.num_frames == 7 * 60


def test_phones_without_relation_stay_at_chance():
    features, _ = corpus(distance=0.0, utts=60)
    labels = corpus(distance=0.0, utts=60, seed=1)[1]
    rows = by_estimator(phone_rows("model", features, labels, [0], SETTINGS, seed=0))
    assert rows["lda"].low < 0.25 < rows["lda"].high + 0.01
    assert rows["lda"].value == pytest.approx(rows["lda"].null, abs=0.04)


def test_two_gaussians_are_told_at_the_known_rate():
    """Equal classes at distance d are told apart by the best rule at Phi(d / 2)."""
    labels = torch.arange(12000) % 2 + 1
    x = torch.randn(12000, 3) @ torch.tensor([[2.0, 0, 0], [1.0, 1.0, 0], [0, 0, 0.1]])
    x[:, 1] += 2.0 * labels  # the covariance of the first two is [[5, 1], [1, 1]]: d = 2 / sqrt(1 - 1/5)
    ids = [f"u{i:02d}" for i in range(40)]
    features = LayerFeatures(["layer0"], [x], ids, torch.arange(40).repeat_interleave(300))
    row = phone_rows("model", features, labels.numpy(), [0], SETTINGS, seed=0)[0]
    best = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(0.5 * 2 / 0.8**0.5)).item()
    assert row.value == pytest.approx(best, abs=0.015) and row.low < best < row.high


def test_discriminant_is_that_of_the_shrunken_covariance_within_classes():
    features, phones = corpus(distance=1.0)
    x, labels = features.layers[0].double(), torch.from_numpy(phones)
    frames = torch.arange(len(labels))
    task = _Task("phone_accuracy", "phones", labels, features.utterance, (frames, frames, frames), [])
    fit = _Covariance.of(moments(x, _OneHot([labels], 5), frames)).discriminant(0, 0.1, task)
    scaled = (x - x.mean(0)) / x.std(0, correction=0)
    means = torch.stack([scaled[labels == k].mean(0) for k in range(5)])
    within = (scaled - means[labels]).T @ (scaled - means[labels]) / len(labels)
    weight = torch.linalg.solve(0.9 * within + 0.1 * torch.eye(6), means.T)
    bias = torch.bincount(labels).double().div(len(labels)).log() - 0.5 * (means.T * weight).sum(0)
    torch.testing.assert_close(scaled @ weight + bias, (x - fit.mean) / fit.spread @ fit.weight + fit.bias)


def test_scale_and_offset_change_nothing():
    features, phones = corpus(distance=1.0)
    moved = replace(features, layers=[features.layers[0] * torch.logspace(-2, 3, 6) + 100.0])
    before, after = (phone_rows("m", f, phones, [0], SETTINGS, seed=0)[0].value for f in (features, moved))
    assert after == pytest.approx(before, abs=0.01) and 0.5 < before < 1.0


def test_layers_are_independent_and_repeatable():
    features, phones = corpus(distance=1.0)
    wide = torch.cat([features.layers[0], torch.zeros(len(phones), 3)], dim=1)  # constant dimensions
    two = LayerFeatures(["layer0", "layer1"], [features.layers[0], wide.half()], features.utt_ids, features.utterance)
    rows = phone_rows("m", two, phones, [0, 1], SETTINGS, seed=0)
    alone = phone_rows("m", features, phones, [0], SETTINGS, seed=0)
    assert repr(rows[:2]) == repr(alone)
    assert rows[2].value == pytest.approx(rows[0].value, abs=0.01) and rows[2].layer_name == "layer1"


def speakers_of(features):
    return {name: name.split("-")[0] for name in features.utt_ids}


def voices(distance, seed=0):
    """Give every utterance of a speaker the speaker's own offset; utterances differ in length."""
    features, _ = corpus(distance=1.0, seed=seed)
    offsets = distance * torch.randn(4, 6)
    number = torch.tensor([int(name[1]) for name in features.utt_ids])
    kept = torch.cat([torch.arange(60 - i) + 60 * i for i in range(24)])
    x = features.layers[0] + offsets[number[features.utterance]]
    return LayerFeatures(["layer0"], [x[kept]], features.utt_ids, features.utterance[kept])


def test_speakers_with_their_own_offset_are_all_found():
    features = voices(distance=5.0)
    rows = by_estimator(speaker_rows("model", features, speakers_of(features), [0], SETTINGS, seed=0))
    assert rows["lda"].value == 1.0 and rows["lda"].num_utts == 8
    assert rows["majority"].value == 0.25 and rows["lda"].null < 0.6
    assert rows["lda"].num_frames > 8 * 30


def test_speakers_without_relation_stay_at_chance():
    values, covered = [], 0
    for seed in range(8):
        features = voices(distance=0.0, seed=seed)
        row = speaker_rows("model", features, speakers_of(features), [0], SETTINGS, seed=seed)[0]
        values.append(row.value)
        covered += row.low <= 0.25 <= row.high
    assert np.mean(values) == pytest.approx(0.25, abs=0.12) and covered >= 6


def test_more_dimensions_than_utterances_are_shrunk():
    features = voices(distance=3.0)
    many = torch.cat([features.layers[0], torch.randn(len(features.utterance), 80)], dim=1)
    features = replace(features, layers=[many])
    assert speaker_rows("model", features, speakers_of(features), [0], SETTINGS, seed=0)[0].value > 0.8


def test_speakers_with_few_utterances_are_left_out_and_said(capsys):
    features = voices(distance=5.0)
    speakers = speakers_of(features)
    speakers[features.utt_ids[0]] = "rare"
    rows = speaker_rows("model", features, speakers, [0], SETTINGS, seed=0)
    assert "fewer than 3 utterances of rare: left out" in capsys.readouterr().out and rows[0].value == 1.0
    assert speaker_rows("model", features, dict.fromkeys(speakers, "one"), [0], SETTINGS, seed=0) == []
    assert "1 speakers with enough utterances, model is left out" in capsys.readouterr().out


def test_constant_layer_gives_the_majority_class():
    features, phones = corpus(distance=1.0)
    rows = by_estimator(
        phone_rows("m", replace(features, layers=[torch.ones(len(phones), 3)]), phones, [0], SETTINGS, 0)
    )
    assert rows["lda"].value == rows["majority"].value


def test_bad_input_is_named():
    features, phones = corpus(distance=1.0)
    with pytest.raises(ValueError, match="m has 1440 frames but 1439 phones"):
        phone_rows("m", features, phones[1:], [0], SETTINGS, seed=0)
    with pytest.raises(ValueError, match="fewer than two phones"):
        phone_rows("m", features, np.minimum(phones, 1), [0], SETTINGS, seed=0)
    with pytest.raises(ValueError, match="no speaker for utterance 's0-u00'"):
        speaker_rows("m", features, {}, [0], SETTINGS, seed=0)
    few, phones = corpus(distance=1.0, utts=4)
    with pytest.raises(ValueError, match="4 utterances cannot be split"):
        phone_rows("m", few, phones, [0], SETTINGS, seed=0)
    with pytest.raises(ValueError, match="shrinkage"):
        ProbeSettings(shrinkage=(0.0,))
