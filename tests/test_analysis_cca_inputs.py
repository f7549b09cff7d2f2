"""Similarity: layers, frames and labels that do not fit; emotions from a corpus to the view; the benchmark."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import soundfile
import torch

from espnet_mamba.analysis.cca import CcaSettings
from espnet_mamba.analysis.similarity import SimilaritySettings, SimilaritySums, accumulate, similarity_rows
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.views import frame_view, open_views, phone_view, utterance_view
from espnet_mamba.data.check import check_sets
from espnet_mamba.data.import_folder import import_folder
from espnet_mamba.data.kaldi import Segment, read_table
from espnet_mamba.data.manifest import Utterance, read_manifest

SETS = ("train", "dev", "test")
FRAMES = 20
FEW = SimilaritySettings(cca=CcaSettings(eps_wide=(1e-8, 1e-2), eps_narrow=(1e-8,)))


def gaussian(rows, width, seed):
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def features_of(*layers):
    count = len(layers[0]) // FRAMES
    ids = [f"u{number:03d}" for number in range(count)]
    owner = torch.arange(count).repeat_interleave(FRAMES)
    return LayerFeatures([f"layer{i}" for i in range(len(layers))], [torch.from_numpy(x) for x in layers], ids, owner)


def sizes_of(features):
    return dict(zip(features.utt_ids, features.sizes, strict=True))


def test_layers_of_different_widths_are_measured_side_by_side():
    """Wider than the view and narrower; each alone gives the same rows."""
    x = gaussian(1000, 12, 0)
    layers = (x, x[:, :3] + gaussian(1000, 3, 1), np.hstack([x, gaussian(1000, 8, 2)]))
    view = frame_view("logmel", features_of(x[:, :6].copy()))
    together = similarity_rows("s", features_of(*layers), [view], FEW, seed=0)
    assert [row.layer for row in together] == [0] * 4 + [1] * 4 + [2] * 4
    for number, layer in enumerate(layers):
        alone = similarity_rows("s", features_of(layer), [view], FEW, seed=0)
        assert [row.value for row in alone] == [row.value for row in together if row.layer == number]
    values = {(row.layer, row.measure): row.value for row in together}
    assert values[0, "cca_mean"] == pytest.approx(1.0, abs=0.01) == values[2, "cca_mean"]
    assert values[1, "cca_mean"] == pytest.approx(np.sqrt(0.5), abs=0.05)


def test_utterances_and_shards_of_another_width_are_refused():
    features = features_of(gaussian(400, 6, 3))
    frames, labels = frame_view("logmel", features), {utt_id: "ab"[n % 2] for n, utt_id in enumerate(features.utt_ids)}
    for view in (frames, utterance_view("speaker", labels, sizes_of(features), "utt2spk")):
        sums, other = SimilaritySums(view, FEW, 0), SimilaritySums(view, FEW, 0)
        sums.add("u000", gaussian(FRAMES, 6, 4))
        with pytest.raises(ValueError, match="u001: 7 features a frame, those before had 6; sums are of one layer"):
            sums.add("u001", gaussian(FRAMES, 7, 5))
        other.add("u002", gaussian(FRAMES, 7, 6))
        with pytest.raises(ValueError, match=f"a shard of {view.name}: 7 features a frame, those before had 6"):
            sums.merge(other)
        sums.add("u001", gaussian(FRAMES, 6, 7))  # what was refused left nothing behind


class OneLayer:
    """A FeatureSource that returns noise, with a NaN in one recording."""

    names, dims, hop = ["layer0", "layer7"], [6, 6], 320

    def __init__(self, bad):
        self.bad = bad

    def __call__(self, wavs, num_samples):
        layers = [torch.from_numpy(gaussian(FRAMES, 6, seed))[None].repeat(len(wavs), 1, 1) for seed in (8, 9)]
        layers[1][wavs[:, 0] == self.bad, 3, 2] = float("nan")
        return layers, torch.full((len(wavs),), FRAMES)


def test_nan_is_found_in_the_pass_over_audio(monkeypatch):
    monkeypatch.setattr(
        "espnet_mamba.targets.features.read_audio", lambda path: np.full(16000, float(path), dtype=np.float32)
    )
    utterances = [Utterance(f"u{number:03d}", str(number), 16000, "s", "") for number in range(20)]
    view = frame_view("logmel", features_of(gaussian(20 * FRAMES, 4, 10)))
    with pytest.raises(ValueError, match="^u013: layer7 holds NaN or infinity; check the model and this recording$"):
        accumulate(OneLayer(13.0), utterances, [view], FEW, seed=0)


def test_constant_columns_leave_values_and_a_constant_layer_stops_no_other(capsys):
    x, extra = gaussian(1000, 6, 11), np.full((1000, 3), 0.7, dtype=np.float32)
    view = frame_view("logmel", features_of(x[:, :3] + gaussian(1000, 3, 12)))
    plain, spoilt = [
        similarity_rows("s", features_of(layer), [view], FEW, seed=0) for layer in (x, np.hstack([x, extra]))
    ]
    assert [row.value for row in spoilt] == pytest.approx([row.value for row in plain], abs=1e-6)
    rows = similarity_rows("s", features_of(x, np.ones_like(x), x[:, :3].copy()), [view], FEW, seed=0)
    assert [row.value for row in rows[:4]] == [row.value for row in plain]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(
        "s, layer1: no similarity with logmel: CCA of layer and target: la"
    )
    constant = rows[4:8]
    assert {(row.layer, row.flag, row.num_frames) for row in constant} == {(1, "constant", 1000)}
    assert [(row.measure, row.estimator) for row in constant] == [(row.measure, row.estimator) for row in plain]
    assert np.isnan([[row.value, row.low, row.high, row.null] for row in constant]).all()
    assert np.isfinite([row.value for row in rows[8:]]).all() and not any(row.flag for row in rows[8:])


def test_fewer_frames_than_dimensions_are_announced_and_null_says_it(capsys):
    """What is then estimated of independent data: held-out CCA is near 0, plain CKA is not, as its null says."""
    x, y = gaussian(30 * FRAMES, 600, 13), gaussian(30 * FRAMES, 5, 14)
    few = SimilaritySettings(nulls=3, cca=CcaSettings(eps_wide=(1e-2,), eps_narrow=(1e-8,), trials=2))
    rows = similarity_rows("sys", features_of(x), [frame_view("logmel", features_of(y))], few, seed=0)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "sys: logmel has 480 rows to fit 600 dimensions" in said
    assert "a lower bound of the layer's own; plain CKA is inflated, see its null" in said
    values = {row.measure: row for row in rows}
    assert abs(values["cca_mean"].value) < 0.1 and abs(values["cka_debiased"].value) < 0.02
    assert values["cka"].value > 0.05 and values["cka"].value == pytest.approx(values["cka"].null, rel=0.1)


def test_phones_past_the_audio_by_a_rounding_are_taken_and_by_more_are_not():
    """20 frames leave room for 0.425 s of audio."""
    for end, taken in ((0.425, True), (0.52, True), (0.53, False)):
        segments = {"u": [Segment(0.0, 0.2, "a"), Segment(0.2, end, "b")]}
        if taken:
            view = phone_view(segments, {"u": FRAMES}, "phones.ctm", ())
            assert np.bincount(view.units["u"].target).tolist() == [10, 10]
        else:
            with pytest.raises(ValueError, match="phones.ctm: u: 'b' ends at 0.53 s, the audio at 0.42 s"):
                phone_view(segments, {"u": FRAMES}, "phones.ctm", ())


@pytest.fixture
def corpus(tmp_path):
    """Three sets of 20 short recordings, two speakers, two emotions under the other name that is read."""
    folder, rng = tmp_path / "corpus", np.random.default_rng(15)
    (folder / "audio").mkdir(parents=True)
    for name in SETS:
        (folder / name).mkdir()
        tables = {"wav.scp": "", "text": "", "utt2spk": "", "utt2emo": ""}
        for number in range(20):
            utt_id = f"{name}{number:02d}"
            soundfile.write(folder / "audio" / f"{utt_id}.wav", 0.1 * rng.standard_normal(6800), 16000)
            values = (f"audio/{utt_id}.wav", "A", f"{name}{number // 10}", ("anger", "sadness")[number % 2])
            for table, value in zip(tables, values, strict=True):
                tables[table] += f"{utt_id} {value}\n"
        for table, text in tables.items():
            (folder / name / table).write_text(text)
    return folder


def bring_in(corpus, policy="refuse"):
    data, dump = corpus.parent / "data", corpus.parent / "dump" / "raw"
    import_folder(corpus, data, SETS)
    check_sets(data, dump, SETS, policy)
    return dump


def test_emotions_reach_the_view_through_import_and_check(corpus, capsys):
    dump = bring_in(corpus)
    assert "test: 20 recordings, 2 speakers utt2emotion" in capsys.readouterr().out
    assert read_table(dump / "test" / "utt2emotion") == read_table(corpus / "test" / "utt2emo")
    bring_in(corpus)  # data/<set>/utt2emotion is the package's own and may be replaced
    sizes = {utterance.utt_id: FRAMES for utterance in read_manifest(dump / "test")}
    (view,), notes = open_views(("emotion",), dump / "test", sizes, (), 5)
    assert (view.name, view.classes, view.num_rows, notes) == ("emotion", ("anger", "sadness"), 20, [])
    emotion = np.repeat(np.arange(20) % 2, FRAMES)[:, None] * np.ones((1, 4))
    features = features_of((emotion + 0.1 * gaussian(20 * FRAMES, 4, 16)).astype(np.float32))
    features.utt_ids[:] = sorted(sizes)
    four = SimilaritySettings(folds=4, cca=CcaSettings(eps_wide=(1e-2,), eps_narrow=(1e-8,), trials=4))
    assert similarity_rows("s", features, [view], four, seed=0)[0].value > 0.99


def test_emotions_that_do_not_fit_the_audio_are_bad_items(corpus, capsys):
    table = corpus / "train" / "utt2emo"
    table.write_text(table.read_text().replace("train03 sadness\n", "") + "ghost anger\n")
    with pytest.raises(ValueError, match="2 bad items"):
        bring_in(corpus)
    said = capsys.readouterr().err
    assert "no_utt2emotion" in said and "or do without utt2emotion" in said and "utt2emotion only" in said
    dump = bring_in(corpus, "skip")
    assert "train03" not in read_table(dump / "train" / "wav.scp") and len(read_table(dump / "train" / "text")) == 19
    table.write_text("train00 anger\ntrain00 sadness\n")
    with pytest.raises(ValueError, match="1 problems in the tables"):
        import_folder(corpus, corpus.parent / "data", SETS)
    assert "utt2emo:2: duplicate id 'train00'" in capsys.readouterr().err


@pytest.fixture
def bench(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    import bench_cca

    yield bench_cca
    for name in ("bench_cca", "bench_cca_inputs", "timing"):
        sys.modules.pop(name, None)


def test_one_pass_scores_as_the_definition_does_on_rows(bench):
    """All splits, eps chosen on held-out rows, from covariance sums and straight from the frames."""
    case = bench.Case(bench.Size(30, 0.4, 1, 24), folds=4, nulls=2, threads=1, part_layers=1, part_trials=4)
    one_pass = bench.one_pass(case)
    split, regularisation = bench.per_split(case), bench.per_regularisation(case)
    assert np.abs(split - regularisation).max() < 1e-6
    assert one_pass[0] == pytest.approx(split[0].mean(1), abs=1e-6)
    assert one_pass[0, 1, 0] > 0.3, "layer 0 knows its phones"


def test_benchmark_marks_what_it_did_not_run(bench, capsys):
    size = ("--minutes", "0.4", "--utterances", "30", "--layers", "2", "--width", "8", "--folds", "4", "--nulls", "2")
    bench.main([*size, "--rounds", "1", "--threads", "1", "--no-memory"])
    said = capsys.readouterr().out
    assert said.count("of 1/8 |") == 2 and said.count("(extrapolated)") == 2
    assert "goal: per split and regularisation / one pass >= 10" in said and "goal: one pass within 120 s" in said
