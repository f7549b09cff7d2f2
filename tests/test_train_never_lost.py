"""Pretraining killed, asked to stop, on a damaged checkpoint or a full disk: nothing is lost."""

import json
import os
import signal
import time

import pytest
import torch
from kills import STEPS, KillTest, at_step, fork, log_of, start, wait

pytestmark = pytest.mark.espnet


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    import espnet_mamba.train.ssamba_task  # noqa: F401 -- imported once, before all forks

    return KillTest(tmp_path_factory.mktemp("hubert"), "hubert", STEPS)


@pytest.fixture(scope="module")
def ssamba(tmp_path_factory):
    import espnet_mamba.train.ssamba_task  # noqa: F401

    return KillTest(tmp_path_factory.mktemp("ssamba"), "ssamba", STEPS)


# --- kill -9 (20 points of it: benchmarks/kill_test.py) ---


@pytest.mark.parametrize(("kind", "share"), [("write", 0.5), ("sync", 0.6), ("rename", 0.7), ("rename", 1.0)])
def test_kill_9_within_a_save(hubert, kind, share):
    name = f"{kind}{share}"
    assert hubert.kill_at_event(name, kind, int(hubert.events[kind] * share)), "it was killed"
    assert hubert.resume(name)[1] == []


def test_kill_9_before_the_first_checkpoint(hubert):
    assert wait(start(hubert, "early", before=at_step(3, lambda _: os.kill(os.getpid(), signal.SIGKILL)))) == -9
    assert len((hubert.work / "early/train_log.jsonl").read_text().splitlines()) == 1, "a row that must not stay twice"
    assert hubert.resume("early") == (0, [])


def test_kill_9_of_ssamba(ssamba):
    assert ssamba.kill_at_event("killed", "rename", ssamba.events["rename"] // 2)
    step, differs = ssamba.resume("killed")
    assert step > 0 and differs == []


# --- asked to stop ---


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 5), (signal.SIGUSR1, 8)])
@pytest.mark.parametrize("objective", ["hubert", "ssamba"])
def test_a_signal_saves_and_ends_without_error(objective, number, step, request):
    """Step 8 ends an epoch: its validation must not be lost either."""
    test, name = request.getfixturevalue(objective), f"signal{number}"
    assert wait(start(test, name, before=at_step(step, lambda _: os.kill(os.getpid(), number)))) == 0
    out = test.work / name
    assert not (out / "last").exists(), "a stage that makes `last` does not count as done"
    marker = json.loads((out / "interrupted.json").read_text())
    assert marker == {"step": step, "signal": signal.Signals(number).name}
    assert torch.load(out / "checkpoint.pth", weights_only=True)["step"] == step
    assert "the same command goes on from there" in log_of(test, name)
    assert test.resume(name) == (step, []), "and the marker is gone, among others"


def test_a_signal_during_validation(hubert):
    def before():
        from espnet_mamba.train.trainer import TrainingRun

        validate = TrainingRun.validate

        def signalled(self, batches, step):
            os.kill(os.getpid(), signal.SIGTERM)
            return validate(self, batches, step)

        TrainingRun.validate = signalled

    assert wait(start(hubert, "validation", before=before)) == 0
    rows = (hubert.work / "validation/train_log.jsonl").read_text()
    assert "valid" not in rows
    assert hubert.resume("validation") == (8, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_job(hubert, number):
    """Clusters signal every process; a loader's worker that died of it would end the run with an error."""

    name = f"group{number}"
    ready = hubert.work / f"{name}.ready"

    def announce(_):
        ready.touch()
        time.sleep(0.5)

    def before():
        os.setsid()
        at_step(5, announce)()

    pid = start(hubert, name, "--num_workers", 2, before=before)
    while not ready.exists():
        time.sleep(0.01)
    os.killpg(pid, number)
    assert wait(pid) == 0, log_of(hubert, name)[-2000:]
    assert hubert.resume(name) == (5, [])


def test_a_process_that_only_waits_passes_a_signal_on(tmp_path):
    """As ESPnet's parent of a process per GPU does: it must outlive them, or two runs could meet in one folder."""
    from multiprocessing import get_context

    from espnet_mamba.train.signals import RunInterrupted, StopRequest, passed_on_to_children

    def child():
        stop = StopRequest(False, "cpu")
        with stop.listening():
            (tmp_path / "ready").touch()
            try:
                while True:
                    stop.check()
                    time.sleep(0.01)
            except RunInterrupted as reason:
                (tmp_path / "reason").write_text(str(reason))

    def parent():
        with passed_on_to_children():
            process = get_context("fork").Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 0
            signal.raise_signal(signal.SIGTERM)  # nobody is left to pass it to

    pid = fork(parent, tmp_path / "log")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGUSR1)
    assert wait(pid) == -signal.SIGTERM, (tmp_path / "log").read_text()
    assert (tmp_path / "reason").read_text() == "SIGUSR1"


# --- damaged and full ---


def test_a_damaged_checkpoint_gives_way_to_the_one_before(hubert):
    assert wait(start(hubert, "flipped", before=at_step(8, lambda _: os.kill(os.getpid(), signal.SIGKILL)))) == -9
    path = hubert.work / "flipped/checkpoint.pth"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert hubert.resume("flipped") == (3, [])
    assert f"going on from the previous one, {path.parent}/checkpoint.previous.pth, of step 3" in log_of(
        hubert, "flipped"
    )


def test_a_full_disk_ends_the_command_with_a_line(hubert, monkeypatch):
    def fill(_):
        from espnet_mamba.train import checkpoint

        def full(*_):
            raise OSError(28, "No space left on device")

        checkpoint._Hashing.write = full

    assert wait(start(hubert, "full", before=at_step(5, fill))) == 1
    last = log_of(hubert, "full").splitlines()[-1]
    assert "checkpoint.pth: no space left" in last and "the checkpoint of step 3 stands" in last
    assert hubert.resume("full") == (3, [])
