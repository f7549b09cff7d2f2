"""Pretraining through ESPnet's own options, in this process; and resumed, killed, and split over processes."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
import yaml
from safetensors.torch import load_file

from espnet_mamba.train.collate import HubertCollate, frame_targets

pytestmark = pytest.mark.espnet


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A dozen noisy tones with 50 Hz labels, as stages 2 and 5 would leave them."""
    from espnet_mamba.targets.labels import write_labels

    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("dev", 4)):
        scp, shapes, labels = [], [], {}
        for i in range(count):
            samples = int(rng.integers(6000, 12000))
            path = folder / f"{name}{i}.wav"
            soundfile.write(path, rng.normal(0, 0.1, samples), 16000)
            scp.append(f"{name}{i:02d} {path}\n")
            shapes.append(f"{name}{i:02d} {samples}\n")
            labels[f"{name}{i:02d}"] = rng.integers(0, 5, (samples - 400) // 320 + 1)
        (folder / name).mkdir()
        (folder / name / "wav.scp").write_text("".join(scp))
        (folder / name / "utt2num_samples").write_text("".join(shapes))
        write_labels(folder / f"{name}.npy", labels)
    model = {
        "conv_layers": [[8, 10, 5]] + [[8, 3, 2]] * 4 + [[8, 2, 2]] * 2,
        "embed_dim": 16,
        "num_layers": 2,
        "state_size": 4,
        "expand": 2,
        "position_kernel": 8,
        "position_groups": 4,
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(model))
    return folder


def arguments(corpus, out, root, *extra):
    words = ["--config", root / "conf/pretrain/tiny_it1.yaml", "--model", corpus / "small.yaml", "--ngpu", 0]
    words += ["--num_classes", 5, "--label_rate", 50, "--output_dir", out, "--batch_bins", 40000]
    for split, name in (("train", "train"), ("valid", "dev")):
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}/wav.scp,speech,sound"]
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}.npy,labels,frame_labels"]
        words += [f"--{split}_shape_file", f"{corpus}/{name}/utt2num_samples"]
    words += ["--num_iters_per_epoch", 5, "--save_interval_steps", 2, "--num_workers", 0]
    return [str(word) for word in (*words, *extra)]


def losses(out):
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    return [(row["step"], row["split"], row["loss"], row["accuracy_masked"]) for row in rows]


def train(corpus, out, root, *extra):
    from espnet_mamba.train.task import HubertTask

    HubertTask.main(cmd=arguments(corpus, out, root, *extra))
    return losses(out)


@pytest.fixture(scope="module")
def undisturbed(corpus, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train(corpus, out, root, "--max_steps", "12", "--log_interval", "3"), out


def test_a_run_leaves_what_the_next_stages_read(undisturbed):
    from espnet_mamba.models.checkpoints import load_checkpoint

    rows, out = undisturbed
    assert [row[0] for row in rows if row[1] == "train"] == [3, 5, 6, 9, 10, 12]
    assert [row[0] for row in rows if row[1] == "valid"] == [5, 10, 12]
    assert load_checkpoint(out / "last").config.embed_dim == 16
    assert yaml.safe_load((out / "config.yaml").read_text())["num_classes"] == 5
    assert load_checkpoint(out / "valid.loss.best").training is False


def test_resumed_in_the_middle_of_an_epoch_is_the_same_run(undisturbed, corpus, root, tmp_path, monkeypatch):
    from espnet_mamba.train.trainer import TrainingRun

    saved = TrainingRun.save

    def save_then_die(self, step):
        saved(self, step)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "r", root, "--max_steps", "12", "--log_interval", "3")
    monkeypatch.undo()
    with (tmp_path / "r/train_log.jsonl").open("a") as log:
        log.write('{"step": 9, "split": "train", "loss": 0.0}\n{"step": 10, "sp')  # written after the checkpoint
    again = train(
        corpus, tmp_path / "r", root, "--max_steps", "12", "--log_interval", "3", "--keep_interval_steps", "4"
    )
    assert again == undisturbed[0]
    assert sorted(path.name for path in (tmp_path / "r").glob("step_*")) == ["step_12", "step_8"]  # 8: resumed from
    last, whole = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "r/step_12", undisturbed[1] / "last")
    )
    assert all(torch.equal(value, whole[name]) for name, value in last.items())
    whole = torch.load(undisturbed[1] / "checkpoint.pth", weights_only=True)["model"]
    resumed = torch.load(tmp_path / "r/checkpoint.pth", weights_only=True)["model"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_kill_9_then_the_same_command(undisturbed, corpus, root, tmp_path):
    command = [sys.executable, "-m", "espnet_mamba.bin.hubert_train"]
    command += arguments(corpus, tmp_path / "k", root, "--max_steps", "12", "--log_interval", "3")
    env = os.environ | {"PYTHONPATH": str(root)}
    child = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    log = tmp_path / "k/train_log.jsonl"
    while child.poll() is None and (not log.is_file() or len(log.read_text().splitlines()) < 2):
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert losses(tmp_path / "k")[-1][0] < 12, "the run ended before it could be killed"
    assert train(corpus, tmp_path / "k", root, "--max_steps", "12", "--log_interval", "3") == undisturbed[0]


def test_two_processes_train_on_the_same_batches(corpus, root, tmp_path):
    """DDP over gloo: with no dropout and masks drawn per rank, the number of masked frames is all that differs."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command = [*launch, "espnet_mamba.bin.hubert_train", "--dist_backend", "gloo"]
    command += arguments(corpus, tmp_path / "d", root, "--max_steps", "4", "--log_interval", "1")
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = losses(tmp_path / "d")
    assert [row[0] for row in rows if row[1] == "train"] == [1, 2, 3, 4]
    assert rows[3][2] < rows[0][2]


def test_wrong_checkpoint_and_labels_are_refused(corpus, root, tmp_path, undisturbed):
    (tmp_path / "o").mkdir()
    (tmp_path / "o/checkpoint.pth").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not a checkpoint of this trainer"):
        train(corpus, tmp_path / "o", root)
    with pytest.raises(ValueError, match="belongs to another model"):
        os.replace(tmp_path / "o/checkpoint.pth", tmp_path / "o/torn")
        os.link(undisturbed[1] / "checkpoint.pth", tmp_path / "o/checkpoint.pth")
        train(corpus, tmp_path / "o", root, "--model_conf", "embed_dim=32")
    with pytest.raises(ValueError, match=r"labels, but \d+ samples at 100 labels per second have"):
        train(corpus, tmp_path / "l", root, "--label_rate", "100")
    with pytest.raises(FileNotFoundError, match="did you mean 'small'"):
        train(corpus, tmp_path / "m", root, "--model", str(corpus / "smal.yaml"))
    with pytest.raises(ValueError, match="--max_epoch --patience: not read in pretraining"):
        train(corpus, tmp_path / "e", root, "--max_epoch", "3", "--patience", "2")
    with pytest.raises(ValueError, match="unknown key 'embd_dim'; did you mean 'embed_dim'"):
        train(corpus, tmp_path / "c", root, "--model_conf", "embd_dim=8")


def test_every_pretraining_yaml_parses_and_builds(root, tmp_path):
    from espnet_mamba.train.task import HubertTask

    for path in sorted((root / "conf/pretrain").glob("*.yaml")):
        words = ["--config", str(path), "--model", str(root / "conf/models/extbimamba_tiny.yaml"), "--ngpu", "0"]
        HubertTask.main(cmd=[*words, "--output_dir", str(tmp_path / path.stem), "--dry_run", "true"])
        assert (tmp_path / path.stem / "config.yaml").is_file()


def test_labels_off_by_one_are_named():
    assert len(frame_targets("u", 16000, np.zeros(49), 50)) == 49
    assert len(frame_targets("u", 16000, np.zeros(98), 100)) == 49
    with pytest.raises(ValueError, match="u: 50 labels, but 16000 samples at 50 labels per second have 49"):
        frame_targets("u", 16000, np.zeros(50), 50)


def test_crop_cuts_audio_and_labels_at_the_same_frames():
    wavs = [np.repeat(np.arange(40), 320)[: 30 * 320 + 400].astype(np.float32), np.zeros(5000, np.float32)]
    items = [(f"u{i}", {"speech": w, "labels": np.arange((len(w) - 400) // 320 + 1)}) for i, w in enumerate(wavs)]
    collate = HubertCollate(label_rate=50, seed=0, train=True)
    _, batch = collate(items)
    frames = (5000 - 400) // 320 + 1
    assert batch["labels"].shape == (2, frames) and batch["speech"].shape == (2, (frames - 1) * 320 + 400)
    assert torch.equal(batch["speech"][0, ::320][:frames].long(), batch["labels"][0])
    assert torch.equal(collate(items[::-1])[1]["labels"][1], batch["labels"][0])  # its place does not matter
    firsts = {int(HubertCollate(50, 0, True, epoch=e)(items)[1]["labels"][0, 0]) for e in range(8)}
    assert len(firsts) > 2


def test_padding_batches_know_their_lengths():
    items = [(f"u{n}", {"speech": np.zeros(n), "labels": np.zeros((n - 400) // 320 + 1, int)}) for n in (5000, 1040)]
    _, batch = HubertCollate(label_rate=50, seed=0, train=False)(items)
    assert batch["num_samples"].tolist() == [5000, 1040] and batch["labels"].shape == (2, 15)


def test_learning_rate_rises_then_falls_to_zero():
    from espnet_mamba.train.schedules import PolynomialWarmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = PolynomialWarmup(optimizer, warmup_ratio=0.2, total_steps=10), []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert optimizer.param_groups[0]["lr"] == 0


def test_no_decay_where_it_would_hurt(corpus, root, tmp_path):
    from espnet_mamba.train.task import HubertTask

    args = HubertTask.get_parser().parse_args(arguments(corpus, tmp_path, root))
    model = HubertTask.build_model(args)
    groups = HubertTask.build_optimizers(args, model)[0].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    kept = {names[id(p)] for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert {n for n in names.values() if n.endswith(("A_log", ".D", "bias")) or "norm" in n} <= kept
    assert not any(n.endswith("in_proj.weight") for n in kept)


def test_packed_batches_hold_every_utterance_and_train(corpus, root, tmp_path):
    from espnet_mamba.train.packed_batches import packed_batches

    shapes = corpus / "train/utt2num_samples"
    batches = packed_batches(shapes, 40000, 1, seed=0)
    samples = dict(line.split() for line in shapes.read_text().splitlines())
    assert sorted(utt for batch in batches for utt in batch) == sorted(samples)
    assert all(sum(int(samples[utt]) for utt in batch) <= 40000 for batch in batches)
    assert len(packed_batches(shapes, 1, 5, seed=0)) == 2, "5 and 7 of 12: the rest joins the last"
    rows = train(corpus, tmp_path / "a", root, "--batch_type", "packed", "--max_steps", "4", "--log_interval", "2")
    assert [row[:2] for row in rows] == [(2, "train"), (4, "train"), (4, "valid")]
    assert all(np.isfinite(row[2]) for row in rows)


def test_packed_collate_is_the_padded_one_without_padding():
    rng = np.random.default_rng(0)
    lengths = (9000, 5000, 20000)
    items = [
        (f"u{n}", {"speech": rng.normal(size=n), "labels": rng.integers(0, 5, (n - 400) // 320 + 1)}) for n in lengths
    ]
    _, padded = HubertCollate(50, 0, train=False)(items)
    _, packed = HubertCollate(50, 0, train=False, packed=True)(items)
    frames = [(n - 400) // 320 + 1 for n in lengths]
    expected = torch.cat([padded["labels"][i, :n] for i, n in enumerate(frames)])
    assert torch.equal(packed["labels"][0], expected) and packed["num_samples"].tolist() == list(lengths)
    assert torch.equal(packed["speech"][0, :9000], padded["speech"][0, :9000])
    assert torch.equal(packed["speech"][0, 9280:14280], padded["speech"][1, :5000])  # slots of whole frames' steps
    _, cropped = HubertCollate(50, 0, train=True, packed=True, max_samples=10000)(items)
    assert cropped["num_samples"].tolist() == [9000, 5000, 400 + 30 * 320]
