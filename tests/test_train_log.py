"""What a run says of itself: the largest batches before its first step, log lines, MFU, tensorboard."""

import dataclasses
import json
import logging
import multiprocessing
import re
from contextlib import nullcontext

import pytest
import torch
from test_models_hubert import TINY
from test_train import corpus, losses, train  # noqa: F401 -- corpus is a fixture

from espnet_mamba.models.macs import count_macs, count_ssamba_macs
from espnet_mamba.models.pretraining import PretrainingLoss
from espnet_mamba.models.ssamba.config import SsambaConfig


def log_rows(out):
    return [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]


def weights(out):
    return torch.load(out / "checkpoint.pth", weights_only=True)["model"]


# --- the largest batches first ---


def test_the_largest_batches_by_audio_and_by_audio_times_length():
    from espnet_mamba.train.worst_batches import worst_batches

    lengths = {"a": 10, "b": 10, "c": 10, "d": 25, "e": 40, "f": 12}
    batches = [("a", "b", "c"), ("d",), ("e", "f"), ("f",)]
    crop = worst_batches(batches, lengths, 1000, packed=False)
    assert crop == [("a", "b", "c"), ("d",)], "e is cropped to f: 24 of 30; d: 25 x 25"
    assert worst_batches(batches, lengths, 1000, packed=True) == [("e", "f")], "52, and 52 x 40"
    assert worst_batches(batches, lengths, 8, packed=False) == [("a", "b", "c")], "24, and 24 x 8: one batch, once"


@pytest.mark.espnet
def test_they_are_tried_before_the_first_step_only_and_change_nothing(corpus, root, tmp_path, monkeypatch, caplog):  # noqa: F811
    from espnet_mamba.train import trainer

    caplog.set_level(logging.INFO)  # pytest has a handler of its own, and so ESPnet sets no level
    conf = ("block=macaron", "ffn_dim=24", "conv_module_kernel=3", "dropout=0.2")  # batch norms have statistics
    options = ["--log_interval", 1, *(word for pair in conf for word in ("--model_conf", pair))]
    train(corpus, tmp_path / "plain", root, "--max_steps", 3, *options)
    assert "worst batches first" not in caplog.text, "not on a CPU unless asked for"
    tried = ["--worst_batches_first", "true"]
    train(corpus, tmp_path / "tried", root, "--max_steps", 3, *options, *tried)
    assert losses(tmp_path / "tried") == losses(tmp_path / "plain")
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "tried")
    assert all(torch.equal(one[name], other[name]) for name in one) and any("running_mean" in name for name in one)
    lines = [line for line in (tmp_path / "tried/train.log").read_text().splitlines() if "worst batches first" in line]
    assert 1 <= len(lines) <= 2
    assert re.search(r"\d+ utterances of up to \S+ s, \S+ s of audio: peak memory \S+ GiB, \S+ GiB more", lines[0])

    def refuse(*_args):
        raise AssertionError("tried again")

    monkeypatch.setattr(trainer, "try_worst_batches", refuse)
    train(corpus, tmp_path / "tried", root, "--max_steps", 4, *options, *tried)
    assert len(log_rows(tmp_path / "tried")) == 3 + 1 + 1 + 1


@pytest.mark.espnet
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_too_little_memory_is_said_before_the_first_step(corpus, root, tmp_path, monkeypatch, kind):  # noqa: F811
    from espnet_mamba.models.hubert import HubertModel

    def fail(*_args, **_kwargs):
        raise kind("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")

    monkeypatch.setattr(HubertModel, "forward", fail)
    message = r"out of memory in the largest batch, before the first step: \d+ utterances of up to \S+ s, \S+ s of "
    message += r"audio on one device; lower --batch_bins \(now 40000\), .* --activation_checkpointing true"
    with pytest.raises(ValueError, match=message):
        train(corpus, tmp_path / "o", root, "--worst_batches_first", "true")
    assert not (tmp_path / "o/checkpoint.pth").exists()


# --- log lines ---


def sums(loss, masked, right, right_seen, seen):
    values = [torch.tensor(float(v)) for v in (loss, masked, 0.5, right, right_seen, seen)]
    return PretrainingLoss(*values)


def test_a_row_is_made_of_sums_and_has_two_accuracies():
    from espnet_mamba.train.meters import LossMeter

    meter = LossMeter()
    meter.add(sums(30, 10, 4, 12, 15), 16000, flops=3e9)
    meter.add(sums(60, 30, 16, 3, 5), 48000, flops=5e9)
    row = meter.row(False, "cpu", 10.0)
    assert row["loss_masked"] == 90 / 40 and row["loss"] == 90 / 40 + 10 * 0.5
    assert row["accuracy_masked"] == 20 / 40 and row["accuracy_unmasked"] == 15 / 20
    assert set(row) == {"loss", "loss_masked", "feature_penalty", "accuracy_masked", "accuracy_unmasked"}
    meter.seconds, meter.waited = 2.0, 0.5
    row = meter.row(False, "cpu", 10.0, peak=1e10)
    assert row["seconds"] == 2.0 and row["audio_rate"] == 2.0 and row["data_wait"] == 0.25
    assert row["mfu"] == pytest.approx(8e9 / (2 * 1e10)) and row["hours"] == 4 / 3600
    assert "mfu" not in meter.row(False, "cpu", 10.0), "a peak that is not known is not guessed"


def test_sums_over_processes_leave_a_process_its_own(monkeypatch):
    """Two processes of like work: rates add up, shares and times are means; a checkpoint in between adds nothing."""
    from espnet_mamba.train.meters import LossMeter

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    meter = LossMeter()
    meter.add(sums(30, 10, 4, 12, 15), 16000, flops=3e9)
    meter.seconds, meter.waited = 2.0, 0.5
    alone = meter.row(False, "cpu", 10.0, peak=1e10)
    meter.reduced(True, "cpu")
    both = meter.row(True, "cpu", 10.0, peak=1e10)
    for name in alone:
        factor = 2 if name in ("audio_rate", "hours") else 1
        assert both[name] == pytest.approx(alone[name] * factor), name


@pytest.mark.espnet
def test_each_line_has_what_is_promised_and_hours_add_up_over_a_resume(corpus, root, tmp_path, caplog):  # noqa: F811
    caplog.set_level(logging.INFO)
    options = ("--log_interval", 2, "--scheduler_conf", "total_steps=7", "--peak_tflops", 0.01)
    train(corpus, tmp_path / "w", root, "--max_steps", 7, *options)
    said = (tmp_path / "w/train.log").read_text().splitlines()
    lines = [line for line in said if " train step=" in line]
    assert len(lines) == 5 and all(re.search(r" ETA=\d+:\d\d:\d\d", line) for line in lines)
    train(corpus, tmp_path / "r", root, "--max_steps", 3, *options)
    train(corpus, tmp_path / "r", root, "--max_steps", 7, *options)
    whole, resumed = ([row for row in log_rows(tmp_path / n) if row["split"] == "train"] for n in "wr")
    wanted = "loss loss_masked feature_penalty accuracy_masked accuracy_unmasked grad_norm learning_rate seconds "
    wanted += "audio_rate hours_seen data_wait mfu"
    assert all(set(wanted.split()) <= set(row) for row in whole) and "hours" not in whole[0]
    assert all(0 <= row["data_wait"] <= 1 and row["mfu"] > 0 for row in whole)
    assert [row["step"] for row in whole] == [2, 4, 5, 6, 7] and [row["step"] for row in resumed] == [2, 3, 4, 5, 6, 7]
    hours = {row["step"]: row["hours_seen"] for row in resumed}
    assert all(row["hours_seen"] == pytest.approx(hours[row["step"]], rel=1e-12) for row in whole)
    assert hours[2] < hours[7] < 7 * 40000 / 16000 / 3600, "at most batch_bins samples in a batch"


def test_curves_do_not_overlap_after_a_resume(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from espnet_mamba.train.meters import StepLog

    def write(start, steps, validated=True):
        log = StepLog(tmp_path, 10, True, True)
        log.start(start, validated)
        for step in steps:
            log.write("train", step, {"loss": 100.0 * start + step})
        log.write("valid", steps[-1], {"loss": 1.0})
        log.close()
        logging.getLogger().handlers = [h for h in logging.getLogger().handlers if not hasattr(h, "baseFilename")]

    write(0, range(1, 8))
    write(4, range(5, 7))  # killed behind 7, its checkpoint is of 4
    read = events.EventAccumulator(str(tmp_path / "tensorboard/train")).Reload()
    values = [(event.step, event.value) for event in read.Scalars("loss")]
    assert values == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 405.0), (6, 406.0)]
    read = events.EventAccumulator(str(tmp_path / "tensorboard/valid")).Reload()
    assert [event.step for event in read.Scalars("loss")] == [6]


@pytest.mark.espnet
@pytest.mark.parametrize("fails", [False, True])
def test_no_process_that_reads_audio_outlives_the_run(corpus, root, tmp_path, monkeypatch, fails):  # noqa: F811
    """They ignore SIGTERM, so Python would wait for them for ever."""
    from espnet_mamba.train.trainer import TrainingRun

    if fails:
        monkeypatch.setattr(TrainingRun, "_log_line", lambda *_: 1 / 0)
    before = set(multiprocessing.active_children())
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        train(corpus, tmp_path / "p", root, "--max_steps", 2, "--log_interval", 1, "--num_workers", 1)
    assert set(multiprocessing.active_children()) == before


# --- MFU ---


def test_a_step_is_three_passes_of_the_formulas():
    from espnet_mamba.train.mfu import forward_macs, step_flops

    config = dataclasses.replace(TINY, layer_drop=0.0)
    one, two = (sum(count_macs(config, n).values()) for n in (16000, 9000))
    assert step_flops(config, [16000, 9000, 9000]) == 6 * (one + 2 * two)
    assert step_flops(config, [399]) == 0
    parts = count_macs(config, 16000)
    outside = parts["front_end"] + parts["projection"] + parts["position"]
    dropped = forward_macs(dataclasses.replace(TINY, layer_drop=0.25), 16000)
    assert dropped == pytest.approx(outside + 0.75 * (one - outside))
    ssamba = SsambaConfig(embed_dim=16, depth=4, state_size=4, num_mel_bins=32, num_frames=64, mask_patches=4)
    once, twice = (forward_macs(dataclasses.replace(ssamba, mask_passes=n), 9000) for n in (1, 2))
    parts = count_ssamba_macs(ssamba, 9000, heads=True)
    assert once == sum(parts.values()) and twice == 2 * once - parts["front_end"] - parts["head"]


@pytest.mark.parametrize(
    ("name", "amp", "tf32", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", True, False, 989),
        ("NVIDIA H100 PCIe", True, False, 756),
        ("NVIDIA H200", True, True, 989),
        ("NVIDIA GH200 480GB", False, True, 494),
        ("NVIDIA A100-SXM4-80GB", False, True, 156),
        ("NVIDIA A100-PCIE-40GB", False, False, 19.5),
        ("NVIDIA RTX A6000", True, False, 154.8),
        ("NVIDIA GeForce RTX 4090", True, False, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", True, False, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", True, False, None),
        ("NVIDIA RTX A4000", True, False, None),
        ("NVIDIA RTX A1000", True, False, None),
        ("Tesla T4", True, False, None),
    ],
)
def test_peaks_are_those_of_listed_gpus_alone(name, amp, tf32, tflops):
    from espnet_mamba.train.mfu import listed_peak, peak_flops

    assert listed_peak(name, amp, tf32) == (None if tflops is None else tflops * 1e12)
    assert peak_flops("cpu", amp) is None and peak_flops("cpu", amp, 0.5) == 5e11
