"""Training on checked recordings: from files and from shards, with a bad file among them, after the audio changed."""

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
import soundfile
import yaml
from kills import fork, wait

from espnet_mamba.data.check import check_sets
from espnet_mamba.data.pack import pack_set

pytestmark = pytest.mark.espnet
FRONT_END = [[8, 10, 5]] + [[8, 3, 2]] * 4 + [[8, 2, 2]] * 2
COUNTS = {"train": 100, "dev": 4}


@pytest.fixture
def corpus(tmp_path):
    """A hundred noises as FLAC, checked by stage 2, with 50 Hz labels and a small model."""
    from espnet_mamba.targets.labels import write_labels

    rng = np.random.default_rng(0)
    for name, count in COUNTS.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        ids = [f"{name}{i:02d}" for i in range(count)]
        labels = {}
        for utt in ids:
            samples = int(rng.integers(4000, 8000))
            soundfile.write(folder / f"{utt}.flac", rng.normal(0, 0.1, samples), 16000)
            labels[utt] = rng.integers(0, 5, (samples - 400) // 320 + 1)
        for table, value in (("wav.scp", "{}.flac"), ("text", "WORD"), ("utt2spk", "s")):
            (folder / table).write_text("".join(f"{utt} {value.format(utt)}\n" for utt in ids))
        write_labels(tmp_path / f"{name}.npy", labels)
    check_sets(tmp_path / "data", tmp_path / "raw", list(COUNTS))
    model = {"conv_layers": FRONT_END, "embed_dim": 16, "num_layers": 2, "state_size": 4, "expand": 2}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(model | {"position_kernel": 8, "position_groups": 4}))
    return tmp_path


def train(corpus, root, name, *extra):
    """Train some updates on batches of 40000 samples; return the log's lines, times left out."""
    from espnet_mamba.train.task import HubertTask

    words = ["--config", root / "conf/pretrain/tiny_it1.yaml", "--model", corpus / "small.yaml", "--ngpu", 0]
    words += ["--num_classes", 5, "--label_rate", 50, "--output_dir", corpus / name, "--max_steps", 12]
    words += ["--batch_type", "bucket", "--batch_bins", 40_000, "--num_iters_per_epoch", 6, "--log_interval", 1]
    for split, folder in (("train", "train"), ("valid", "dev")):
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/raw/{folder}/wav.scp,speech,sound"]
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{folder}.npy,labels,frame_labels"]
        words += [f"--{split}_shape_file", f"{corpus}/raw/{folder}/utt2num_samples"]
    HubertTask.main(cmd=[str(word) for word in (*words, *extra)])
    rows = [json.loads(line) for line in (corpus / name / "train_log.jsonl").read_text().splitlines()]
    kept = ("split", "step", "loss", "accuracy_masked", "grad_norm")
    return [tuple(row.get(key) for key in kept) for row in rows]


def die_after(step, monkeypatch):
    from espnet_mamba.train.trainer import TrainingRun

    saved = TrainingRun.save

    def save_then_die(self, now):
        saved(self, now)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "save", save_then_die)


def test_files_shards_workers_and_resumed_runs_are_bitwise_alike(corpus, root, monkeypatch):
    whole = train(corpus, root, "files", "--num_workers", 0)
    assert len(whole) == 14 and np.isfinite([row[2] for row in whole]).all()
    die_after(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, root, "resumed", "--num_workers", 2, "--save_interval_steps", 8)
    monkeypatch.undo()
    for name in COUNTS:
        pack_set(corpus / "raw" / name, corpus / "shards" / name, 200_000)
    for path in corpus.glob("data/*/*.flac"):
        path.unlink()
    assert train(corpus, root, "shards", "--num_workers", 2) == whole
    rows = train(corpus, root, "resumed", "--num_workers", 0)
    assert [row for row in rows if row[0] == "train"] == [row for row in whole if row[0] == "train"]


def test_one_bad_file_in_a_hundred(corpus, root, caplog):
    """It went bad after the check: the run says so at its start, finishes, and names the file."""
    path = corpus / "data/train/train50.flac"
    path.write_bytes(path.read_bytes()[:2000])
    rows = train(corpus, root, "bad", "--num_workers", 1, "--batch_bins", 80_000)  # more than a pass
    assert [row[1] for row in rows if row[0] == "train"] == list(range(1, 13))
    assert f"{corpus}/raw/train/manifest.tsv is older than the audio: 1 of 100 recordings looked at" in caplog.text
    assert f"{path} has 2000 bytes, had" in caplog.text and "rerun stage 2 (check)" in caplog.text
    assert caplog.text.count("train50 is left out") == 1
    head, row = (corpus / "bad/unreadable.tsv").read_text().splitlines()
    assert row.startswith(f"train\ttrain50\ttruncated\t{path}\t") and head.startswith("set\tutterance\treason")
    from espnet_mamba.analysis.report_training import left_out

    text, table = left_out(corpus / "bad")
    assert text.text.startswith("bad: 1 recordings could not be read") and table.rows[0][1] == "train50"
    assert left_out(corpus) == []


def test_what_the_targets_left_out_is_left_out_of_training(corpus, root, caplog):
    """A file went bad between stages 2 and 3; labels that are missing for any other reason still end the run."""
    from espnet_mamba.targets.labels import FrameLabels, write_labels

    labels = dict(FrameLabels(corpus / "train.npy"))
    del labels["train50"]
    write_labels(corpus / "train.npy", labels)
    with pytest.raises(ValueError, match="train50: no labels; rerun the targets stage"):
        train(corpus, root, "refused")
    why = "train50.flac: its header says 5000 samples"
    (corpus / "quality.json").write_text(json.dumps({"left_out": {"train": {"train50": why}}}))
    rows = train(corpus, root, "without", "--num_workers", 1, "--batch_bins", 80_000)  # more than a pass
    assert [row[1] for row in rows if row[0] == "train"] == list(range(1, 13))
    assert caplog.text.count("train50 is left out") == 1 and why in caplog.text
    _, row = (corpus / "without/unreadable.tsv").read_text().splitlines()
    assert row.startswith(f"train\ttrain50\tno_labels\t{corpus}/train.npy\t{why}\t")


def test_a_reader_killed_in_the_midst_of_a_step_is_said_with_the_remedy(corpus, root, tmp_path):
    """In a process of its own: see test_train_batches."""

    def run():
        from espnet_mamba.train.trainer import TrainingRun

        def kill_reader(self, *_):
            multiprocessing.active_children()[0].kill()
            time.sleep(60)  # PyTorch ends this by an exception

        TrainingRun._update = kill_reader
        try:
            train(corpus, root, "killed", "--num_workers", 1)
        except RuntimeError as error:
            (tmp_path / "said").write_text(str(error))
        os._exit(0)

    assert wait(fork(run, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "said").read_text()
    assert "is killed by signal" in said and "if memory ran out, lower --num_workers or --batch_bins" in said, said


def test_a_copied_corpus_is_not_called_changed(corpus, root, caplog):
    for path in corpus.glob("data/*/*.flac"):
        os.utime(path)
    train(corpus, root, "copied", "--max_steps", 1)
    assert "older than the audio" not in caplog.text
