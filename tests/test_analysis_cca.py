"""CCA, PWCCA and CKA on data whose answer is known, their null and intervals, and sums that no order can change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cross_decomposition import CCA
from threadpoolctl import threadpool_limits

from espnet_mamba.analysis.cca import CcaSettings, cross_validate, in_sample
from espnet_mamba.analysis.cka import align
from espnet_mamba.analysis.covariance import CovarianceSums
from espnet_mamba.analysis.similarity import (
    SimilaritySettings,
    SimilaritySums,
    accumulate,
    jackknife_interval,
    rows_of_layer,
    similarity_rows,
    split_interval,
)
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.views import FrameGrid, frame_view, open_views, phone_view, segment_view, utterance_view
from espnet_mamba.data.kaldi import Segment, write_ctm, write_table
from espnet_mamba.data.manifest import Utterance

FOLDS, FRAMES = 10, 50
FEW = SimilaritySettings(cca=CcaSettings(eps_wide=(1e-8, 1e-2), eps_narrow=(1e-8,)))


def moments_of(x, y, chunk=FRAMES):
    sums = CovarianceSums({"x": x.shape[1], "y": y.shape[1]}, [("x", "y")], FOLDS)
    for number, start in enumerate(range(0, len(x), chunk)):
        sums.add(number % FOLDS, {"x": x[start : start + chunk], "y": y[start : start + chunk]}, f"u{number}")
    return sums.moments()


def gaussian(rows, width, seed):
    return np.random.default_rng(seed).standard_normal((rows, width))


def layers_of(*layers, frames=FRAMES):
    """LayerFeatures of utterances of ``frames`` frames each, named u000 ..."""
    count = len(layers[0]) // frames
    tensors = [torch.from_numpy(np.asarray(layer, dtype=np.float32)) for layer in layers]
    ids = [f"u{number:03d}" for number in range(count)]
    return LayerFeatures(
        [f"layer{i}" for i in range(len(layers))], tensors, ids, torch.arange(count).repeat_interleave(frames)
    )


def sizes_of(features):
    return dict(zip(features.utt_ids, features.sizes, strict=True))


def by_measure(rows):
    return {row.measure: row for row in rows}


def test_rotation_and_any_invertible_map_give_one():
    x = gaussian(3000, 20, 0)
    rotation = np.linalg.qr(gaussian(20, 20, 1))[0]
    for y in (x @ rotation, x @ gaussian(20, 20, 2) + 5.0, 1e3 * x[:, ::-1], 1e-2 * x @ rotation):
        scores = cross_validate(moments_of(x, y), "x", "y", CcaSettings()).scores
        assert scores.mean(0) == pytest.approx([1.0, 1.0], abs=0.01)


def test_planted_correlations_are_recovered_on_held_out_rows():
    planted = np.array([0.95, 0.7, 0.4, 0.0])
    x, noise = gaussian(20000, 12, 3), gaussian(20000, 4, 4)
    y = planted * x[:, :4] + np.sqrt(1 - planted**2) * noise
    moments = moments_of(x @ gaussian(12, 12, 5), y @ gaussian(4, 4, 6))
    mean, _ = cross_validate(moments, "x", "y", CcaSettings()).scores.mean(0)
    assert mean == pytest.approx(planted.mean(), abs=0.02)


def test_scores_do_not_depend_on_scale():
    x, y = gaussian(2000, 10, 7), gaussian(2000, 6, 8)
    y[:, :3] += x[:, :3]
    expected = cross_validate(moments_of(x, y), "x", "y", CcaSettings()).scores
    aligned = align(moments_of(x, y), "x", "y").values
    for scale in (1e-2, 1e3):
        moments = moments_of(x * scale, y)
        assert cross_validate(moments, "x", "y", CcaSettings()).scores == pytest.approx(expected, abs=1e-9)
        assert align(moments, "x", "y").values == pytest.approx(aligned, abs=1e-9)


def test_independent_data_stay_below_their_null_line():
    features = layers_of(gaussian(3000, 20, 9))
    rows = similarity_rows("s", features, [frame_view("other", layers_of(gaussian(3000, 8, 10)))], FEW, seed=0)
    for row in rows:
        assert row.value < row.null, row.measure
        assert row.measure == "cka" or row.low < 0.0 < row.high, row.measure
    values = by_measure(rows)
    assert abs(values["cca_mean"].value) < 0.02
    assert values["cka"].null < 0.02


def test_in_sample_scores_are_the_textbook_ones():
    """PWCCA by its definition, on data points, from scikit-learn's canonical variates."""
    x, y = gaussian(400, 7, 11), gaussian(400, 3, 12)
    y[:, 0] += x[:, 0]
    y[:, 1] += 0.5 * x[:, 1] - 0.2 * x[:, 2]
    y *= [1.0, 3.0, 0.2]
    found = in_sample(moments_of(x, y), "x", "y")
    variates_x, variates_y = CCA(n_components=3, tol=1e-12, max_iter=10000).fit(x, y).transform(x, y)
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(variates_x.T, variates_y.T, strict=True)]
    unit = variates_y / np.linalg.norm(variates_y, axis=0)
    weights = np.abs(unit.T @ (y - y.mean(0))).sum(1)  # sum over columns of |<h_i, y_j>|
    assert found.cca_mean == pytest.approx(np.mean(correlations), abs=1e-6)
    assert found.pwcca == pytest.approx(weights @ correlations / weights.sum(), abs=1e-6)
    assert in_sample(moments_of(y, x), "x", "y") == pytest.approx(found, abs=1e-9)


def test_held_out_score_is_that_of_the_rows_themselves():
    """One trial against the same steps on rows: standardise, regularise, project, correlate."""
    x, y = gaussian(1000, 6, 13), gaussian(1000, 2, 14)
    y[:, 0] += x[:, 0]
    eps = 0.1
    found = cross_validate(moments_of(x, y), "x", "y", CcaSettings((eps,), (eps,), trials=1)).scores[0]
    fold = np.arange(1000) // FRAMES % FOLDS
    train, test = fold > 1, fold == 0
    scaled = [(view - view[train].mean(0)) / view[train].std(0) for view in (x, y)]
    c_xx, c_yy = [view[train].T @ view[train] / train.sum() + eps * np.eye(view.shape[1]) for view in scaled]
    roots = [np.linalg.inv(np.linalg.cholesky(block)).T for block in (c_xx, c_yy)]
    left, _, right = np.linalg.svd(roots[0].T @ (scaled[0][train].T @ scaled[1][train] / train.sum()) @ roots[1])
    projected = [scaled[0][test] @ roots[0] @ left[:, :2], scaled[1][test] @ roots[1] @ right.T]
    expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(projected[0].T, projected[1].T, strict=True)])
    assert found[0] == pytest.approx(expected, abs=1e-9)


def test_cka_of_rotation_and_scale_is_one_and_debiased_takes_chance_away():
    x = gaussian(500, 30, 15)
    rotation = np.linalg.qr(gaussian(30, 30, 16))[0]
    assert align(moments_of(x, 7.0 * x @ rotation + 3.0), "x", "y").values == pytest.approx((1.0, 1.0), abs=1e-9)
    plain, debiased = align(moments_of(x, gaussian(500, 30, 17)), "x", "y").values
    assert plain == pytest.approx(30 / 500, rel=0.2)
    assert abs(debiased) < 0.01


def test_debiased_cka_is_the_ratio_of_unbiased_hsic():
    """Song et al. 2012, equation 5, on kernels of rows."""
    x, y = gaussian(60, 5, 18) + 2.0, gaussian(60, 4, 19)
    y[:, 0] += x[:, 0]

    def hsic(a, b):
        n, one = len(a), np.ones(len(a))
        k, m = [view @ view.T * (1 - np.eye(n)) for view in (a, b)]
        ones = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ m) + ones - 2 / (n - 2) * one @ k @ m @ one

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert align(moments_of(x, y, chunk=6), "x", "y").values[1] == pytest.approx(expected, abs=1e-10)


def test_intervals_hold_their_value():
    low, high = split_interval(0.5 + 0.01 * gaussian(10, 1, 21)[:, 0], 10)
    assert 0.48 < low < 0.5 < high < 0.52
    x = gaussian(1000, 4, 22)
    found = align(moments_of(x, x + gaussian(1000, 4, 23)), "x", "y")
    low, high = jackknife_interval(found.values[0], found.left_out[:, 0])
    assert 0.0 < found.values[0] - low < 0.1 and 0.0 < high - found.values[0] < 0.1 and high < 1.0


def as_bytes(moments):
    return b"".join(moments.blocks[pair].tobytes() for pair in sorted(moments.blocks))


def test_order_and_shards_never_change_a_bit():
    rng = np.random.default_rng(24)
    widths = {"x": 170, "y": 3}  # x is wider than a panel
    parts = []
    for number, scale in enumerate(10 ** rng.uniform(-4, 4, 40)):  # plain float64 sums would differ
        rows = {name: rng.normal(1, scale, (number % 29 + 1, width)) for name, width in widths.items()}
        parts.append((number % 3, rows))

    def summed(order):
        sums = CovarianceSums(widths, [("x", "y")], 3)
        for number in order:
            sums.add(*parts[number], where=f"u{number}")
        return sums

    expected = as_bytes(summed(range(40)).moments())
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(40)
        assert as_bytes(summed(order).moments()) == expected
        shards = [summed(part) for part in np.array_split(order, 2 + 3 * seed)]
        for shard in shards[1:]:
            shards[0].merge(shard)
        assert as_bytes(shards[0].moments()) == expected
    naive = sum(part["x"].T @ part["y"] for fold, part in parts if fold == 1)
    block = summed(range(40)).moments().blocks["x", "y"][1]
    assert np.abs(block[:-2, :-2] - naive).max() <= 1e-14 * np.abs(naive).max()
    assert block[-1, -1] == sum(len(part["x"]) for fold, part in parts if fold == 1)


def test_many_additions_carry_exactly():
    values = gaussian(8600, 2, 25) * 10.0 ** np.random.default_rng(26).uniform(-5, 3, (8600, 1))

    def summed(numbers):
        sums = CovarianceSums({"x": 2}, [("x", "x")], 1)
        for number in numbers:
            sums.add(0, {"x": values[number : number + 1]}, "u")
        return sums

    whole, shard = summed(reversed(range(8600))).moments(), summed(range(5000))
    shard.merge(summed(range(5000, 8600)))
    assert as_bytes(whole) == as_bytes(shard.moments())
    assert whole.blocks["x", "x"][0][:2, :2] == pytest.approx(values.T @ values, rel=1e-13)


def test_threads_of_blas_never_change_a_bit():
    found = []
    for threads in (1, 2):
        with threadpool_limits(threads, user_api="blas"):
            found.append(as_bytes(moments_of(gaussian(1800, 200, 42), gaussian(1800, 30, 43), chunk=900)))
    assert found[0] == found[1]


class ListSource:
    """A FeatureSource whose frames are looked up by the recording's first sample."""

    names, dims, hop = ["layer0", "layer1"], [6, 6], 320

    def __init__(self, features):
        self.frames = [features.of_utterance(layer) for layer in range(2)]

    def __call__(self, wavs, num_samples):
        numbers = [int(round(float(wav[0]) * 1000)) for wav in wavs]
        return [torch.stack([layer[n] for n in numbers]) for layer in self.frames], torch.full((len(wavs),), FRAMES)


def test_shards_of_audio_give_the_rows_of_the_whole(monkeypatch):
    x = gaussian(1500, 6, 27)
    features = layers_of(x, x @ gaussian(6, 6, 28) + gaussian(1500, 6, 29))
    speakers = {utt_id: f"s{number % 3}" for number, utt_id in enumerate(features.utt_ids)}
    views = [frame_view("logmel", layers_of(x[:, :4])), utterance_view("speaker", speakers, sizes_of(features), "f")]
    utterances = [Utterance(utt_id, str(number), 16000, "s", "") for number, utt_id in enumerate(features.utt_ids)]
    monkeypatch.setattr(
        "espnet_mamba.targets.features.read_audio", lambda path: np.full(16000, int(path) / 1000, dtype=np.float32)
    )
    source = ListSource(features)
    shards = [accumulate(source, utterances[part::3], views, FEW, seed=0) for part in (2, 0, 1)]
    rows = []
    for view in views:
        for layer, name in enumerate(source.names):
            sums = shards[0][name, view.name]
            with pytest.raises(ValueError, match="20 utterances were not given, the first is 'u000'"):
                sums.moments()
            for shard in shards[1:]:
                sums.merge(shard[name, view.name])
            rows += rows_of_layer("s", layer, name, sums)
    whole = accumulate(source, utterances, views, FEW, seed=0)
    assert rows == [
        row
        for view in views
        for layer, name in enumerate(source.names)
        for row in rows_of_layer("s", layer, name, whole[name, view.name])
    ]
    kept = similarity_rows("s", features, views, FEW, seed=0)
    assert kept == similarity_rows("s", features, views, FEW, seed=0, num_threads=2)
    assert kept[8:] == rows[8:], "rows of a pooled view are kept either way"
    for row, other in zip(rows, kept, strict=True):
        values = [[each.value, each.low, each.high, each.null] for each in (row, other)]
        assert values[0] == pytest.approx(values[1], abs=1e-9), row.measure
    with pytest.raises(ValueError, match="u001: given twice to the sums of logmel"):
        shards[0]["layer0", "logmel"].merge(shards[2]["layer0", "logmel"])


def phone_data(strength, utts=40):
    """Frames of four phones, silence every fifth frame; the layer holds the phone's place times ``strength``."""
    phones = np.random.default_rng(30).integers(0, 4, utts * FRAMES)
    features = layers_of(strength * gaussian(4, 10, 31)[phones] + gaussian(len(phones), 10, 32))
    segments = {
        utt_id: [
            Segment(0.02 * t + 0.005, 0.02 * t + 0.025, "sil" if t % 5 == 0 else "abcd"[phones[number * FRAMES + t]])
            for t in range(FRAMES)
        ]
        for number, utt_id in enumerate(features.utt_ids)
    }
    return features, phone_view(segments, sizes_of(features), "phones.ctm", ("sil",))


def test_labels_that_a_layer_encodes_are_seen_and_others_are_not():
    features, view = phone_data(strength=5.0)
    assert (view.classes, view.num_rows) == (("a", "b", "c", "d"), 40 * 40)
    rows = by_measure(similarity_rows("s", features, [view], FEW, seed=0))
    assert rows["cca_mean"].value > 0.9 and rows["pwcca"].value > 0.9
    assert rows["cca_mean"].low < rows["cca_mean"].value < rows["cca_mean"].high <= 1.0
    assert all(row.null < 0.3 and row.value > row.null for row in rows.values())
    features, view = phone_data(strength=0.0)
    rows = by_measure(similarity_rows("s", features, [view], FEW, seed=0))
    assert all(row.value < row.null < 0.2 for row in rows.values())


def test_speaker_in_the_utterance_mean():
    speaker = np.arange(120) % 3
    known = np.repeat(gaussian(3, 8, 33)[speaker], FRAMES, axis=0) + gaussian(120 * FRAMES, 8, 34)
    features = layers_of(known, gaussian(120 * FRAMES, 8, 35))
    labels = {utt_id: f"s{number}" for utt_id, number in zip(features.utt_ids, speaker, strict=True)}
    view = utterance_view("speaker", labels, sizes_of(features), "utt2spk")
    rows = similarity_rows("s", features, [view], FEW, seed=0)
    known, unknown = by_measure(rows[:4]), by_measure(rows[4:])
    assert known["cca_mean"].value > 0.95 and known["cka_debiased"].value > known["cka_debiased"].null
    assert unknown["cca_mean"].value < unknown["cca_mean"].null


def test_segment_rows_are_means_of_the_frames_in_it():
    frames = np.arange(20, dtype=np.float32)[:, None]
    # Frame t is centred on 0.0125 + 0.02 t seconds.
    segments = {"u": [Segment(0.0, 0.1, "a"), Segment(0.1, 0.105, "short"), Segment(0.2, 0.4, "b")]}
    view = segment_view("word", segments, {"u": 20}, "words.ctm", ())
    assert view.layer_rows("u", frames)[:, 0].tolist() == [2.0, 14.5]  # frames 0..4 and 10..19
    assert view.target_rows("u").tolist() == [[1.0, 0.0], [0.0, 1.0]]  # "short" has no row
    central = segment_view("word", segments, {"u": 20}, "words.ctm", (), central_third=True)
    assert central.units["u"].start.tolist() == [1, 13] and central.units["u"].stop.tolist() == [4, 17]
    coarse = segment_view("word", segments, {"u": 10}, "words.ctm", (), grid=FrameGrid(640, 320))
    assert coarse.units["u"].start.tolist() == [0, 2, 5]  # centred on 0.02 + 0.04 t: "short" has one


def test_nulls_take_targets_from_another_utterance():
    features, view = phone_data(strength=1.0, utts=12)
    for number in range(3):
        donors = view.donors(number, seed=0)
        assert sorted(donors) == sorted(donors.values()) == features.utt_ids
        assert all(utt_id != donor for utt_id, donor in donors.items())
    assert view.donors(0, seed=0) != view.donors(1, seed=0)
    assert np.array_equal(view.target_rows("u000", "u003"), view.target_rows("u003"))


def test_constant_and_dependent_columns_do_not_matter():
    x, y = gaussian(2000, 8, 36), gaussian(2000, 4, 37)
    y[:, :2] += x[:, :2]
    expected = cross_validate(moments_of(x, y), "x", "y", CcaSettings()).scores.mean(0)
    spoilt_x = np.hstack([x, np.full((2000, 2), 7.3), x[:, :3] - x[:, 3:6]])
    spoilt_y = np.hstack([y, np.full((2000, 1), -1e3), y[:, :1]])
    found = cross_validate(moments_of(spoilt_x, spoilt_y), "x", "y", CcaSettings()).scores.mean(0)
    assert found[0] == pytest.approx(expected[0], abs=0.01)
    fewer_rows_than_columns = cross_validate(moments_of(gaussian(60, 90, 38), y[:60], 6), "x", "y", CcaSettings())
    assert np.isfinite(fewer_rows_than_columns.scores).all()


def test_unusable_input_is_named_in_one_line():
    x, y = gaussian(500, 3, 39), gaussian(500, 2, 40)
    with pytest.raises(ValueError, match="CCA of x and y: y is the same in all rows"):
        cross_validate(moments_of(x, np.ones_like(y)), "x", "y", CcaSettings())
    with pytest.raises(ValueError, match="fold 4 has fewer than 2 rows"):
        cross_validate(moments_of(x[:200], y[:200]), "x", "y", CcaSettings())
    with pytest.raises(ValueError, match="u0: y holds NaN"):
        moments_of(x, y * np.nan)
    with pytest.raises(ValueError, match="u0: squares sum to .*scale the features"):
        moments_of(x * 1e9, y)
    sums = [CovarianceSums({"x": width}, [("x", "x")], 2) for width in (3, 4)]
    with pytest.raises(ValueError, match="shards of different views"):
        sums[0].merge(sums[1])
    view, broken = frame_view("y", layers_of(y)), layers_of(x)
    broken.layers[0][120, 1] = np.inf
    with pytest.raises(ValueError, match="u002: layer0 holds NaN or infinity"):
        similarity_rows("s", broken, [view], FEW, seed=0)
    with pytest.raises(ValueError, match="u000: view y was made for 50 frames, the layer has 49"):
        SimilaritySums(view, FEW, 0).add("u000", x[:49])
    with pytest.raises(ValueError, match="u9: view y was made without this utterance"):
        SimilaritySums(view, FEW, 0).add("u9", x[:50])


def test_label_files_that_do_not_fit_are_named(tmp_path):
    sizes, segments = {"u0": 50, "u1": 50}, {"u0": [Segment(0.0, 0.5, "a")], "u1": [Segment(0.0, 1.3, "b")]}
    with pytest.raises(ValueError, match="phones.ctm: u1: 'b' ends at 1.30 s, the audio at 1.02 s"):
        phone_view(segments, sizes, "phones.ctm", ())
    with pytest.raises(ValueError, match="words.ctm: nothing for utterance 'u1'"):
        segment_view("word", {"u0": segments["u0"]}, sizes, "words.ctm", ())
    with pytest.raises(ValueError, match="utt2spk: no speaker for 1 utterances, the first is 'u1'"):
        utterance_view("speaker", {"u0": "s"}, sizes, "utt2spk")
    write_table(tmp_path / "utt2spk", {"u0": "s", "u1": "t"})
    write_ctm(tmp_path / "words.ctm", {"u0": segments["u0"], "u1": [Segment(0.0, 0.5, "b")]})
    write_table(tmp_path / "utt2emotion", {"u0": "sad", "u1": "sad"})
    views, notes = open_views(("logmel", "speaker", "word", "phones", "emotion"), tmp_path, sizes, (), 1)
    assert [view.name for view in views] == ["speaker", "word"]
    assert notes[0] == f"similarity with phones is left out: it needs {tmp_path / 'phones.ctm'}"
    assert notes[1].endswith("utt2emotion: 1 of 1 labels have 1 rows or more; emotion needs two")


def test_few_rows_are_announced(capsys):
    features = layers_of(gaussian(1000, 40, 41), frames=25)
    labels = {utt_id: "ab"[number % 2] for number, utt_id in enumerate(features.utt_ids)}
    view = utterance_view("speaker", labels, sizes_of(features), "utt2spk")
    rows = similarity_rows("sys", features, [view], FEW, seed=0)
    assert "sys: speaker has 32 rows to fit 40 dimensions" in capsys.readouterr().out
    assert all(np.isfinite([row.value, row.low, row.high, row.null]).all() for row in rows)
    labels = dict(list(labels.items())[:20])
    view = utterance_view("speaker", labels, dict.fromkeys(labels, 25), "utt2spk")
    assert similarity_rows("sys", features, [view], FEW, seed=0) == []
    assert "speaker is left out: 20 utterances with 20 rows are too few for 10 folds" in capsys.readouterr().out
