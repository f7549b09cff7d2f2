"""CCA and CKA from kept rows: any order, shared products, few rows solved among themselves; null line and folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from espnet_mamba.analysis.cca import CcaSettings, cross_validate
from espnet_mamba.analysis.cka import align
from espnet_mamba.analysis.covariance import CovarianceSums, assign_folds, moments_of_rows
from espnet_mamba.analysis.similarity import SimilaritySettings, SimilaritySums, null_line, similarity_rows
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.views import frame_view, phone_view
from espnet_mamba.data.kaldi import Segment

FRAMES = 50
FEW = SimilaritySettings(cca=CcaSettings(eps_wide=(1e-8, 1e-2), eps_narrow=(1e-8,)))


def gaussian(rows, width, seed):
    return np.random.default_rng(seed).standard_normal((rows, width))


def features_of(layer):
    count = len(layer) // FRAMES
    ids = [f"u{number:03d}" for number in range(count)]
    owner = torch.arange(count).repeat_interleave(FRAMES)
    return LayerFeatures(["layer0"], [torch.from_numpy(layer.astype(np.float32))], ids, owner)


def test_kept_rows_in_any_order_and_shards_give_the_same_bits():
    frames = gaussian(1000, 6, 44) * 10.0 ** np.random.default_rng(45).uniform(-3, 3, (1000, 1))
    features = features_of(frames)
    view, parts = frame_view("logmel", features_of(frames[:, :3])), list(features.of_utterance(0))

    def moments(order, shards=1):
        kept = [SimilaritySums(view, FEW, 0, keep_rows=True) for _ in range(shards)]
        for place, number in enumerate(order):
            kept[place % shards].add(features.utt_ids[number], parts[number].numpy())
        for other in kept[1:]:
            kept[0].merge(other)
        return b"".join(block.tobytes() for blocks in kept[0].moments().blocks.values() for block in blocks)

    expected = moments(range(20))
    assert moments(reversed(range(20))) == expected == moments(np.random.default_rng(46).permutation(20), shards=3)
    with pytest.raises(ValueError, match="logmel: a shard with rows and one with sums"):
        SimilaritySums(view, FEW, 0).merge(SimilaritySums(view, FEW, 0, keep_rows=True))


def test_few_rows_solved_among_rows_score_as_by_covariances():
    """60 rows of 90 columns, one of them constant, two alike; classes on the other side, one missing in a fold."""
    x, y = gaussian(60, 90, 47), np.eye(4)[np.r_[np.arange(6) % 3, np.arange(54) % 4]]
    x[:, 5], x[:, 7] = 3.3, x[:, 8]
    x[:, :4] += 2.0 * y
    folds = [{"x": [x[start : start + 6]], "y": [y[start : start + 6]]} for start in range(0, 60, 6)]
    by_rows, by_sums = moments_of_rows(folds, keep_rows=True), moments_of_rows(folds)
    for settings in (CcaSettings((0.1,), (1e-2,)), CcaSettings()):
        found, expected = [cross_validate(moments, "x", "y", settings) for moments in (by_rows, by_sums)]
        assert found.scores == pytest.approx(expected.scores, abs=1e-6)
    added = CovarianceSums({"x": 90, "y": 4}, [("x", "y")], 10)
    for number, fold in enumerate(folds):
        added.add(number, {name: parts[0] for name, parts in fold.items()}, "u")
    assert found.scores[:, 0].mean() > 0.2
    assert align(by_rows, "x", "y").values == pytest.approx(align(added.moments(), "x", "y").values, abs=1e-12)


def test_frames_of_two_views_are_multiplied_once_and_give_the_same():
    """Phones without silence beside all frames; alone, and where one utterance is silent, so that folds differ."""
    x = gaussian(1000, 8, 48)
    features, logmel = features_of(x), frame_view("logmel", features_of(x[:, :3] + gaussian(1000, 3, 49)))
    sizes = dict.fromkeys(features.utt_ids, FRAMES)
    for silent in ((), ("u003",)):
        segments = {
            utt_id: [
                Segment(0.1 * part, 0.1 * part + 0.1, "sil" if part % 4 == 0 or utt_id in silent else "ab"[part % 2])
                for part in range(10)
            ]
            for utt_id in features.utt_ids
        }
        phones = phone_view(segments, sizes, "phones.ctm", ("sil",))
        together = similarity_rows("s", features, [logmel, phones], FEW, seed=0)
        assert [row.reference for row in together] == ["logmel"] * 4 + ["phones"] * 4
        assert [row.num_frames for row in together[::4]] == [1000, phones.num_rows]
        alone = [row for view in (logmel, phones) for row in similarity_rows("s", features, [view], FEW, seed=0)]
        for row, other in zip(together, alone, strict=True):
            values = [[each.value, each.low, each.high, each.null] for each in (row, other)]
            assert values[0] == pytest.approx(values[1], abs=1e-9), row.measure


def test_null_line_is_passed_by_one_null_in_twenty():
    draws = np.random.default_rng(20).standard_normal((4000, 6))
    passed = np.mean([draw[-1] > null_line(draw[:-1]) for draw in draws])
    assert passed == pytest.approx(0.05, abs=0.01)


def test_folds_hang_on_names_and_spread_labels():
    names = [f"u{number}" for number in range(40)]
    labels = {name: "ab"[number % 2] for number, name in enumerate(names)}
    folds = assign_folds(names, 10, 0, labels)
    assert folds == assign_folds(names[::-1], 10, 0, labels)
    assert all(sum(folds[name] == fold for name in names if labels[name] == "a") == 2 for fold in range(10))
