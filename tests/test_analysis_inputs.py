"""What the analysis stage takes: input points of a model, kept features, and input that cannot be measured."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_analysis_stage import write_set

from espnet_mamba.analysis.layer_information import information_notes, information_rows, width_groups
from espnet_mamba.analysis.layer_measures import LayerMeasures
from espnet_mamba.analysis.purity import PurityTask, phones_of_frames
from espnet_mamba.analysis.settings import AnalysisSettings, PuritySettings
from espnet_mamba.analysis.stage import run_analysis
from espnet_mamba.analysis.statistics import LayerFeatures, collect_features, read_features, split_layer
from espnet_mamba.data.kaldi import Segment, read_ctm, write_ctm
from espnet_mamba.data.manifest import read_manifest
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.checkpoints import save_checkpoint as save_ssamba
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.model import SsambaModel
from espnet_mamba.targets.features import add_conv, open_features

CONV = ((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (24, 2, 2))
QUICK = AnalysisSettings(information=("ksg",), per_utterance_utterances=0, measures=())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    for seed, name in enumerate(("dev", "test")):
        write_set(root / "dump" / name, 8, seed)
    torch.manual_seed(0)
    tiny = HubertConfig(conv_layers=CONV, embed_dim=16, num_layers=2, state_size=2, expand=1, position="none")
    save_checkpoint(HubertModel(tiny), root / "hubert")
    sizes = {"embed_dim": 16, "depth": 6, "state_size": 2}
    save_ssamba(SsambaModel(SsambaConfig(name="tiny", **sizes)), root / "ssamba")
    return root


def frames(widths=(4, 4), utts=8, size=60, seed=0):
    """Return random features of some layers."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(utts * size, width, generator=generator) for width in widths]
    names, utt_ids = [f"layer{i}" for i in range(len(widths))], [f"u{i}" for i in range(utts)]
    return LayerFeatures(names, layers, utt_ids, torch.arange(utts).repeat_interleave(size))


class Fake:
    """A source of two layers on the 50 Hz grid; ``spoil`` may change one utterance's frames."""

    names, dims, hop = ["layer0", "layer1"], [3, 3], 320

    def __init__(self, spoil=None, constant=False):
        self.spoil, self.constant = spoil, constant

    def __call__(self, wavs, num_samples):
        counts = (num_samples - 400) // 320 + 1
        layers = [torch.randn(len(wavs), int(counts.max()), 3) for _ in self.names]
        if self.constant:
            layers[1] = torch.full_like(layers[1], 0.25)
        for row, count in enumerate(counts.tolist()):
            if count == self.spoil:
                layers[1][row, 3, 1] = torch.nan
            layers[0][row, count:] = torch.nan  # padding is not a frame
        return layers, counts


def test_conv_is_the_front_end_before_norm_and_projection_in_the_same_pass(place, monkeypatch):
    source, utterances = open_features(str(place / "hubert")), read_manifest(place / "dump/test")
    plain = collect_features(source, utterances)
    passes = []
    monkeypatch.setattr(source.model.front_end, "forward", _counted(source.model.front_end.forward, passes))
    assert add_conv(source) and add_conv(source) and source.names == ["layer0", "layer1", "layer2", "conv"]
    rest, conv = split_layer(collect_features(source, utterances), "conv")
    assert len(passes) == 1 and source.dims[-1] == conv.shape[1] == 24
    assert rest.names == plain.names
    assert all(torch.equal(a, b) for a, b in zip(rest.layers, plain.layers, strict=True))
    model, first = source.model, utterances[0]
    wav = torch.from_numpy(_audio(first.path))
    own = conv[plain.utterance == plain.utt_ids.index(first.utt_id)]
    torch.testing.assert_close(own, model.front_end(wav[None])[0], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        layer0 = model.encoder_norm(model.projection(model.feature_norm(own)))
    torch.testing.assert_close(layer0, plain.of_utterance(0)[plain.utt_ids.index(first.utt_id)], atol=1e-4, rtol=1e-3)


def _counted(forward, passes):
    def wrapped(*args):
        passes.append(1)
        return forward(*args)

    return wrapped


def _audio(path):
    import soundfile

    return soundfile.read(path, dtype="float32")[0]


def test_systems_without_conv_are_named_and_the_rest_is_measured(place, tmp_path, capsys):
    systems = {"ssamba": str(place / "ssamba"), "hubert": str(place / "hubert"), "fbank": "logmel"}
    run_analysis(QUICK, place / "dump", ("dev", "test"), systems, tmp_path)
    said = capsys.readouterr().out
    assert "ssamba: mutual information with conv is left out" in said
    assert "hubert: mutual information with conv" not in said and "fbank: mutual information with conv" not in said
    lines = (tmp_path / "mutual_information.csv").read_text().splitlines()
    assert any(line.startswith("hubert") and ",conv," in line for line in lines)
    assert any(line.startswith("ssamba") and ",logmel," in line for line in lines)
    assert not any(line.startswith("ssamba") and ",conv," in line for line in lines)


def test_ssamba_gives_a_layer_per_pair_of_directions(place):
    source = open_features(str(place / "ssamba"))
    assert source.names == ["layer0", "layer1", "layer2", "layer3"]  # 6 blocks, 3 pairs
    model, wav = source.model.model, torch.randn(1, 16000) * 0.1
    with torch.no_grad():
        output = model(wav, directions=True)
        layers, _ = source(wav, torch.tensor([16000]))
    assert len(output.directions) == 3
    for pair, (ahead, back) in enumerate(output.directions):
        before, after = output.hidden_states[pair], output.hidden_states[pair + 1]
        torch.testing.assert_close(after, 2 * before + ahead + back)  # both directions bring the stream along
        if pair < 2:  # the last one has passed the final norm
            columns = output.grid.to_columns(after[:, 1:], "mean")[0].repeat_interleave(8, 0)
            torch.testing.assert_close(layers[pair + 1][0], columns[: layers[pair + 1].shape[1]])


def test_features_are_kept_when_asked_and_read_back_whole(place, tmp_path):
    kept = replace(QUICK, keep_features=str(tmp_path / "kept"))
    run_analysis(kept, place / "dump", ("dev", "test"), {"a b/c": str(place / "hubert")}, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    assert names == ["a_b-c_dev.safetensors", "a_b-c_test.safetensors"]
    source = open_features(str(place / "hubert"))
    add_conv(source)
    expected = collect_features(source, read_manifest(place / "dump/test"))
    found = read_features(tmp_path / "kept/a_b-c_test.safetensors")
    assert (found.names, found.utt_ids) == (expected.names, expected.utt_ids)
    assert torch.equal(found.utterance, expected.utterance)
    assert all(torch.equal(a, b) for a, b in zip(found.layers, expected.layers, strict=True))
    run_analysis(QUICK, place / "dump", ("dev", "test"), {"a": str(place / "hubert")}, tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.safetensors")), "discarded by default"


def test_nan_and_constant_features_are_named(place):
    utterances = read_manifest(place / "dump/test")
    size = (utterances[3].num_samples - 400) // 320 + 1
    with pytest.raises(ValueError, match="mine test: s1-u03: layer1 holds NaN or infinity"):
        collect_features(Fake(spoil=size), utterances, label="mine test")
    with pytest.raises(ValueError, match="mine test: layer1 is constant, the same in all"):
        collect_features(Fake(constant=True), utterances, label="mine test")
    with pytest.raises(ValueError, match="layer0 reaches .* float16 holds 65504"):
        collect_features(_Loud(), utterances, torch.float16)
    assert collect_features(Fake(), utterances).names == ["layer0", "layer1"]


class _Loud(Fake):
    def __call__(self, wavs, num_samples):
        layers, counts = super().__call__(wavs, num_samples)
        return [layer * 1e6 for layer in layers], counts


def test_label_files_that_do_not_fit_are_named():
    features = frames(utts=2)
    segments = {"u0": [Segment(0.0, 0.5, "a")], "u1": [Segment(0.5, 1.5, "b")]}
    with pytest.raises(ValueError, match=r"t/phones.ctm: u1: 'b' ends at 1.50 s, the audio at 1.2[0-9] s; correct"):
        phones_of_frames(features, segments, {"a": 1, "b": 2}, "t/phones.ctm")
    with pytest.raises(ValueError, match=r"t/words.ctm: no words for utterance 'u1' \(1 in all\)"):
        phones_of_frames(features, {"u0": segments["u0"]}, {}, "t/words.ctm")
    segments["u1"] = [Segment(0.5, 1.25, "b")]
    assert phones_of_frames(features, segments, {"a": 1, "b": 2}, "t/phones.ctm")[60:].tolist() == [0] * 25 + [2] * 35


@pytest.fixture
def words(place):
    """Lay words.ctm beside the test set: 'low' and 'high' in every utterance, one word of its own in each."""
    path, phones = place / "dump/test/words.ctm", read_ctm(place / "dump/test/phones.ctm")
    named = {"a": "low", "b": "high"}
    segments = {
        utt_id: [*(Segment(s.start, s.end, named[s.label]) for s in rows), Segment(0.85, 0.95, f"only{utt_id}")]
        for utt_id, rows in phones.items()
    }
    write_ctm(path, segments)
    yield path, segments
    path.unlink()


def measures(place):
    utterances = read_manifest(place / "dump/test")
    settings = replace(QUICK, measures=("discrete_information",))
    quick = replace(settings.discrete, clusters=(4,), iterations=5, shuffles=2, resamples=20)
    task = LayerMeasures(replace(settings, discrete=quick), place / "dump/test", utterances, None, None, 0)
    return task, collect_features(open_features("logmel"), utterances)


def test_codes_are_measured_with_words_that_several_utterances_hold(place, words):
    task, logmel = measures(place)
    rows = {(row.reference, row.estimator): row for row in task.measure("fbank", logmel, None) if row.unit == "nats"}
    known = rows["words", "kmeans4_miller_madow"]
    assert known.num_frames == 8 * 30, "0.6 s of two words in each utterance; words of one utterance are left out"
    assert known.value == pytest.approx(math.log(2), abs=0.05), "two tones, two words: one bit"
    assert known.null < 0.5 * known.value or math.isfinite(known.null)


def test_words_that_miss_an_utterance_or_are_all_rare_are_named(place, words):
    path, segments = words
    first = sorted(segments)[0]
    write_ctm(path, {utt_id: rows for utt_id, rows in segments.items() if utt_id != first})
    task, logmel = measures(place)
    with pytest.raises(ValueError, match=f"words.ctm: no words for utterance '{first}'"):
        task.measure("fbank", logmel, None)
    write_ctm(path, {utt_id: [Segment(0.1, 0.5, f"w{utt_id}")] for utt_id in segments})
    task, logmel = measures(place)
    assert not [row for row in task.measure("fbank", logmel, None) if row.reference == "words"]
    assert "0 words of" in task.notes[0] and "min_utterances" in task.notes[0]


def test_layers_of_different_widths_do_not_change_each_other():
    features = frames((4, 6, 4, 6), size=160)
    assert width_groups(features, [0, 1, 2, 3]) == [[0, 2], [1, 3]]
    settings = AnalysisSettings(references=("logmel",), mine_seeds=1, per_utterance_utterances=1, mine_utterances=2)
    quick = replace(settings.bounds, steps=5, check_every=5, batch_frames=32, seeds=1, resamples=10)
    critics = replace(settings.mine_paper, epochs=1, minibatch=32)
    settings = replace(settings, bounds=quick, mine_paper=critics, ksg=replace(settings.ksg, components=2, groups=2))
    x = {"logmel": torch.randn(len(features.utterance), 5)}
    rows = {(r.measure, r.estimator, r.layer): r.value for r in information_rows("s", features, x, settings, 0)}
    assert {layer for _, _, layer in rows} == {0, 1, 2, 3} and len(rows) == 4 * (2 + 4 + 4 + 2)
    narrow = LayerFeatures(
        ["layer0", "layer2"], [features.layers[0], features.layers[2]], features.utt_ids, features.utterance
    )
    alone = {(r.measure, r.estimator, r.layer): r.value for r in information_rows("s", narrow, x, settings, 0)}
    for (measure, estimator, layer), value in alone.items():
        assert rows[measure, estimator, 2 * layer] == pytest.approx(value, rel=1e-5, abs=1e-6), (estimator, layer)


def test_input_point_on_another_grid_is_refused():
    with pytest.raises(ValueError, match="logmel has 100 frames, the layers have 480; both must be on one grid"):
        information_rows("s", frames(), {"logmel": torch.randn(100, 5)}, QUICK, 0)


def test_what_is_too_short_is_said_and_flagged():
    features = frames((300, 300), utts=8, size=60)
    settings = replace(QUICK, information=("mine_paper", "bounds"), mine_seeds=1)
    notes = information_notes("wide", features, settings)
    assert notes[0].startswith("mine_paper: 8 of 8 utterances have fewer than 128 frames (one minibatch)")
    assert "trains nothing" in notes[0]
    assert notes[1].startswith("wide: 240 frames to train on for 300 dimensions") and "lower bounds" in notes[1]
    quick = replace(settings.bounds, steps=5, check_every=5, batch_frames=32, seeds=1, resamples=10)
    rows = information_rows("wide", features, {}, replace(settings, bounds=quick), 0)
    assert {row.estimator for row in rows} == {f"{n}_heldout" for n in ("dv", "infonce", "smile", "nwj")}
    assert all(row.flag for row in rows)
    few = replace(settings, bounds=replace(quick, whitening="pca", components=8), information=("bounds",))
    assert information_notes("narrow", features, few) == []


def test_purity_names_a_set_whose_phones_miss_an_utterance(place, tmp_path):
    segments = read_ctm(place / "dump/test/phones.ctm")
    lost = segments.popitem()[0]
    write_ctm(tmp_path / "phones.ctm", segments)
    logmel = collect_features(open_features("logmel"), read_manifest(place / "dump/test"))
    task = PurityTask([tmp_path / "phones.ctm"] * 2, PuritySettings(clusters=(4,)), 0)
    with pytest.raises(ValueError, match=f"phones.ctm: no phones for utterance '{lost}'"):
        task.count("fbank", logmel, logmel)
    assert np.isfinite(logmel.layers[0].numpy()).all()
