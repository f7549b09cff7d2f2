"""The targets stages in shards: the same labels to the last bit, nothing done twice, bad recordings named."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from espnet_mamba.bin import make_targets as command
from espnet_mamba.data.kaldi import Segment, write_ctm, write_table
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.recipe.sharded import StepFailedError, run_steps
from espnet_mamba.targets import pipeline
from espnet_mamba.targets.features import iterate_features, open_features, plan_batches
from espnet_mamba.targets.kmeans import assign
from espnet_mamba.targets.labels import FrameLabels
from espnet_mamba.targets.pipeline import TargetOptions, TargetSteps, make_targets
from espnet_mamba.targets.shards import Shard, parse_shard
from espnet_mamba.targets.summary import format_quality

MFCC = TargetOptions("mfcc", 0, 6, max_frames=200)
TRAIN = 24


@pytest.fixture(autouse=True)
def _short_batches(monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_SECONDS", {"cpu": 1.0})


@pytest.fixture
def dump(tmp_path):
    """Checked data: 24 and 5 recordings of 0.1 to 0.5 s, with phones."""
    draw = np.random.default_rng(0)
    for name, count in (("train", TRAIN), ("dev", 5)):
        folder = tmp_path / "raw" / name
        folder.mkdir(parents=True)
        lengths = {f"{name}-{i:02d}": int(draw.integers(1600, 8000)) for i in range(count)}
        for utt_id, length in lengths.items():
            tone = np.sin(np.arange(length) * draw.uniform(0.05, 0.6)) * 0.2
            soundfile.write(folder / f"{utt_id}.wav", tone + draw.normal(0, 0.05, length), 16000)
        write_table(folder / "wav.scp", {utt_id: str(folder / f"{utt_id}.wav") for utt_id in lengths})
        write_table(folder / "utt2num_samples", {utt_id: str(length) for utt_id, length in lengths.items()})
        write_table(folder / "utt2spk", dict.fromkeys(lengths, "s"))
        write_ctm(folder / "phones.ctm", {u: [Segment(0.0, 0.05, "sil"), Segment(0.05, 0.1, "AH")] for u in lengths})
    return tmp_path / "raw"


def save_model(folder):
    """A HuBERT of two blocks, other weights each time."""
    sizes = {"embed_dim": 16, "num_layers": 2, "state_size": 2, "expand": 1, "position": "none"}
    conv = ((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2))
    save_checkpoint(HubertModel(HubertConfig(conv_layers=conv, **sizes)), folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save_model(tmp_path / "model")


def in_shards(dump, out, options, count, sets=("train", "dev")):
    """All steps as jobs do them, each shard by steps of its own."""
    for step in ("sample", "fit", "label", "merge"):
        for number in range(1, count + 1) if step in ("sample", "label") else [None]:
            steps = TargetSteps(dump, out, sets, options, count)
            result = getattr(steps, step)(*([Shard(number, count)] if number else []))
    return result


def made(out):
    """All that a stage makes, as bytes, and the centroids."""
    files = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".npy", ".tsv", ".json")}
    return files, load_file(out / "centroids.safetensors")["centroids"]


def test_one_two_and_seven_shards_give_the_same_bits(dump, model, tmp_path):
    options = TargetOptions(str(model), 1, 9, max_frames=300, num_threads=1)
    make_targets(dump, tmp_path / "whole", ("train", "dev"), options)
    expected, centroids = made(tmp_path / "whole")
    assert sorted(expected) == ["dev.npy", "dev.tsv", "quality.json", "train.npy", "train.tsv"]
    assert len(centroids) == 9 and not (tmp_path / "whole/shards").exists()
    for count, threads in ((2, 1), (7, 3)):
        out = tmp_path / f"{count}"
        in_shards(dump, out, TargetOptions(str(model), 1, 9, max_frames=300, num_threads=threads), count)
        found, other = made(out)
        assert found == expected and torch.equal(other, centroids)
    make_targets(dump, tmp_path / "seed", ("train", "dev"), TargetOptions(str(model), 1, 9, 300, seed=1))
    assert made(tmp_path / "seed")[0]["train.npy"] != expected["train.npy"]


def test_a_shard_takes_whole_batches_of_the_corpus(dump):
    steps = TargetSteps(dump, dump / "out", ("train",), MFCC, 7)
    utterances = steps._manifests["train"]
    whole = plan_batches(utterances, 1.0)
    dealt = [steps._batches(utterances, Shard(number, 7)) for number in range(1, 8)]
    assert len(whole) > 7 and sorted(whole, key=str) == sorted(sum(dealt, []), key=str)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_labels_are_the_nearest_of_the_training_centroids(dump, model, tmp_path):
    result = make_targets(dump, tmp_path / "out", ("train", "dev"), TargetOptions(str(model), 1, 9, max_frames=150))
    assert result["fit_frames"] <= 150 and result["rate_hz"] == 50 and result["left_out"] == {}
    centroids = load_file(tmp_path / "out/centroids.safetensors")["centroids"]
    for name in ("train", "dev"):  # the dev set has no centroids of its own
        labels = FrameLabels(tmp_path / f"out/{name}.npy")
        utterances = TargetSteps(dump, tmp_path, (name,), MFCC, 1)._manifests[name]
        frames = [
            (u.utt_id, assign(f[1], centroids)) for u, f in iterate_features(open_features(str(model)), utterances)
        ]
        same = [np.mean(labels[utt_id] == codes.numpy()) for utt_id, codes in frames]
        assert len(labels) == len(frames) and np.mean(same) > 0.99  # batches here are others: ties may fall elsewhere
    score = result["sets"]["dev"]
    assert score["all"]["num_frames"] == sum(FrameLabels(tmp_path / "out/dev.npy").counts())
    assert 0 < score["no_silence"]["num_frames"] < score["all"]["num_frames"]


def test_the_blocks_above_the_layer_are_not_run(model, monkeypatch):
    from espnet_mamba.targets.features import features_of, open_layer

    wavs = [torch.randn(4000), torch.randn(3000)]
    every = features_of(open_features(str(model)), wavs)
    source = open_layer(str(model), 1)
    assert len(source.model.blocks) == 1 and source.names == ["layer1"]
    assert all(torch.equal(one[0], all_[1]) for one, all_ in zip(features_of(source, wavs), every, strict=True))
    with pytest.raises(ValueError, match="layer 3 does not exist; it has layer0, layer1, layer2"):
        open_layer(str(model), 3)


def test_what_is_finished_is_not_done_again(dump, tmp_path, monkeypatch):
    asked = []
    real = pipeline.extract
    monkeypatch.setattr(pipeline, "extract", lambda *a: asked.append(a[-1]) or real(*a))
    out, sets = tmp_path / "out", ("train",)
    steps = TargetSteps(dump, out, sets, MFCC, 2)
    steps.sample(Shard(2, 2))
    assert steps.pending("sample") == [1] and steps.pending("label") == [1, 2]
    with pytest.raises(FileNotFoundError, match=r"sample\.1of2\.json: this shard is not there; run the stage again"):
        steps.fit()
    with pytest.raises(FileNotFoundError, match="not there, or of other inputs or options; run --step fit"):
        steps.label(Shard(1, 2))
    steps.sample(Shard(1, 2))
    steps.sample(Shard(2, 2))
    steps.fit()
    steps.label(Shard(1, 2))
    with pytest.raises(FileNotFoundError, match=r"label\.train\.2of2\.json: this shard is not there"):
        steps.merge()
    assert asked == ["sample 2/2", "sample 1/2", "label train 1/2"]
    in_shards(dump, out, MFCC, 2, sets)
    assert asked[3:] == ["label train 2/2"]
    make_targets(dump, out, sets, MFCC)  # parts are gone, centroids stand
    assert asked[4:] == ["label train 1/1"]
    make_targets(dump, out, sets, TargetOptions("mfcc", 0, 5, max_frames=200))
    assert asked[5:] == ["sample 1/1", "label train 1/1"]


def test_a_changed_corpus_or_model_is_noticed(dump, model, tmp_path):
    options = TargetOptions(str(model), 1, 4, max_frames=100)
    before = TargetSteps(dump, tmp_path / "out", ("train",), options, 1)._digests
    assert TargetSteps(dump, tmp_path / "out", ("train",), options, 3)._digests == before
    table = dump / "train/utt2num_samples"
    kept = table.read_text()
    table.write_text(kept.replace(kept.split()[1], "1234", 1))
    assert TargetSteps(dump, tmp_path / "out", ("train",), options, 1)._digests["sample"] != before["sample"]
    table.write_text(kept)
    save_model(model)
    assert TargetSteps(dump, tmp_path / "out", ("train",), options, 1)._digests["sample"] != before["sample"]


def test_bad_recordings_are_named_and_have_no_labels(dump, tmp_path):
    torn, silent = dump / "train/train-03.wav", dump / "train/train-10.wav"
    torn.write_bytes(torn.read_bytes()[:-700])
    soundfile.write(silent, np.full(3000, np.nan), 16000, subtype="FLOAT")
    results = [in_shards(dump, tmp_path / str(count), MFCC, count) for count in (1, 5)]
    assert results[0] == results[1] and made(tmp_path / "1")[0] == made(tmp_path / "5")[0]
    left_out = results[0]["left_out"]
    assert list(left_out) == ["train"] and sorted(left_out["train"]) == ["train-03", "train-10"]
    assert "its header says" in left_out["train"]["train-03"] and "NaN" in left_out["train"]["train-10"]
    labels = FrameLabels(tmp_path / "5/train.npy")
    assert len(labels) == TRAIN - 2 and "train-03" not in labels and "train-04" in labels
    assert json.loads((tmp_path / "5/quality.json").read_text()) == results[1]
    assert "train: 2 utterances could not be used and have no labels:\n  train-03: " in format_quality(results[1])


def test_many_bad_recordings_are_refused(dump, tmp_path):
    for number in range(4):
        (dump / f"train/train-0{number}.wav").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"4 of 24 utterances cannot be used \(limit 10%\), the first is train-0\d: .*0 bytes"
    ):
        make_targets(dump, tmp_path / "out", ("train",), TargetOptions("mfcc", 0, 6))
    assert not (tmp_path / "out/train.npy").exists()


def test_options_that_cannot_be(dump, tmp_path):
    with pytest.raises(ValueError, match="--num_clusters 70000: a label has 16 bits, 65536 at most"):
        make_targets(dump, tmp_path, ("train",), TargetOptions("mfcc", 0, 70_000))
    for text in ("0/3", "4/3", "2", "a/b"):
        with pytest.raises(ValueError, match="not one of 1/n to n/n"):
            parse_shard(text)


@pytest.mark.parametrize("options", [["--nj", "3"], ["--step", "label"], ["--step", "fit", "--shard", "1/2"]])
def test_the_command_refuses_halves(options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make_targets", "--dump_dir", "d", "--out_dir", "o", *options])
    with pytest.raises(SystemExit):
        command.main()
    said = capsys.readouterr().err
    assert "--shard i/n goes with" in said or "--nj 3: jobs need a --launcher" in said


FAKE = """
step=${2} part=${4%%/*}
[ "$3" = --shard ] || part=1
if [ -e fail ] && [ "$step" = label ] && [ "$part" = 2 ]; then kill -9 $$; fi
echo "$step $part" >> done; touch "$step.$part"
"""
LAUNCHER = [sys.executable, "-m", "espnet_mamba.bin.run_job", "--backend", "local", "--max_jobs", "1"]


def run_fake(folder, launcher=LAUNCHER, count=3):
    """Run all steps with a command that only says that it ran."""
    (folder / "job.sh").write_text(FAKE)
    steps = {"sample": count, "fit": 1, "label": count, "merge": 1}

    def pending(step):
        return [n for n in range(1, steps[step] + 1) if not Path(f"{step}.{n}").exists()]

    run_steps(launcher, ["bash", "job.sh"], count, folder / "log", pending)


def test_steps_run_as_jobs_in_order_and_a_killed_one_is_named(root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(root))
    Path("fail").touch()
    with pytest.raises(StepFailedError) as caught:
        run_fake(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "label: 1 of 3 shards are not finished; run the stage again: what is finished is kept"
    log, alone = tmp_path / "log/label.2.log", shlex.join(["bash", "job.sh", "--step", "label", "--shard", "2/3"])
    assert lines[1:] == [f"  shard 2: log: {log}; alone: {alone}"]
    said = capfd.readouterr().err
    assert "label: 1 of 3 jobs failed: job 2: killed (signal 9), most often because it went over its memory" in said
    assert Path("done").read_text().split("\n")[:4] == ["sample 1", "sample 2", "sample 3", "fit 1"]
    Path("fail").unlink()
    run_fake(tmp_path)
    assert sorted(Path("done").read_text().split("\n")[6:]) == ["", "label 1", "label 2", "label 3", "merge 1"]
    assert "sample: done already" in capfd.readouterr().out
