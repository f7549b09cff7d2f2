"""Processes of their own: logs, limits, failures that show why, and the progress that is relayed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from espnet_mamba.asr import training
from espnet_mamba.asr.jobs import Job, log_tail, run_jobs, threads_per_job


def write_and_stop(path, text):
    print("working", flush=True)
    os.write(2, b"a library's own output\n")
    path.write_text(text)


def fail(reason):
    raise RuntimeError(reason)


def wait_for(other):
    while not other.exists():
        time.sleep(0.01)


def test_jobs_run_and_their_output_is_in_their_logs(tmp_path, capsys):
    jobs = [Job(f"job{i}", write_and_stop, tmp_path / f"{i}.log", (tmp_path / f"{i}.txt", str(i))) for i in range(3)]
    run_jobs(jobs, 2, lambda log: None)
    assert [(tmp_path / f"{i}.txt").read_text() for i in range(3)] == ["0", "1", "2"]
    assert "working" in log_tail(tmp_path / "1.log") and "library" in log_tail(tmp_path / "1.log")
    assert capsys.readouterr().out.count("done in") == 3


def test_two_at_once_really_are_at_once(tmp_path):
    made = tmp_path / "made"
    waits = Job("waits", wait_for, tmp_path / "a.log", (made,))
    run_jobs([waits, Job("makes", write_and_stop, tmp_path / "b.log", (made, ""))], 2, lambda log: None)
    assert made.exists()


def test_a_failure_is_reported_with_the_end_of_its_log_and_stops_the_others(tmp_path):
    endless = Job("endless", wait_for, tmp_path / "b.log", (tmp_path / "never",))
    jobs = [Job("asr random", fail, tmp_path / "a.log", ("no such tensor",)), endless]
    with pytest.raises(ValueError, match=r"asr random failed \(exit status 1\)(.|\n)*RuntimeError: no such tensor"):
        run_jobs(jobs, 2, lambda log: None)


def write_threads(path):
    path.write_text(f"{torch.get_num_threads()} {os.environ['OMP_NUM_THREADS']}")


def test_each_job_gets_its_share_of_the_cores_whatever_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)), raising=False)
    assert [threads_per_job(jobs) for jobs in (0, 1, 2, 3, 6)] == [5, 5, 2, 1, 1]
    for count, nj, threads in ((2, 3, 2), (3, 3, 1), (3, 2, 2)):
        jobs = [Job(f"job{i}", write_threads, tmp_path / f"{i}.log", (tmp_path / f"{i}.txt",)) for i in range(count)]
        run_jobs(jobs, nj, lambda log: None)
        assert (tmp_path / "0.txt").read_text() == f"{threads} {threads}"
    assert os.environ["OMP_NUM_THREADS"] == "4"  # the caller keeps its own


def test_progress_is_relayed(tmp_path, capsys):
    job = Job("slow", time.sleep, tmp_path / "a.log", (1.0,))
    run_jobs([job], 1, lambda log: "half way", every=0.2)
    assert "slow: half way" in capsys.readouterr().out


def test_progress_of_a_training_is_read_from_espnets_log():
    assert training.progress("nothing yet") is None
    log = (
        "x (trainer:327) INFO: 4/16epoch started. Estimated time to finish: 1 minute and 3 seconds\n"
        "x INFO: 4epoch results: [train] loss=9.0, acc=0.1, [valid] loss_ctc=3.5, acc=0.756, loss=15.960, time=1\n"
        "x (trainer:327) INFO: 5/16epoch started. Estimated time to finish: 58.1 seconds\n"
    )
    assert training.progress(log) == "epoch 5/16, validation loss 16.0, token accuracy 0.76, 58.1 seconds left"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_killed_caller_leaves_no_process_behind(tmp_path):
    code = (
        "import os, time; from pathlib import Path; from espnet_mamba.asr.jobs import Job, run_jobs\n"
        "def note(path):\n    path.write_text(str(os.getpid())); time.sleep(60)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "run_jobs([Job('sleeps', note, folder / 'a.log', (folder / 'pid',))], 1, lambda log: None)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    caller.kill()
    caller.wait()
    for _ in range(200):
        if not alive(child):
            break
        time.sleep(0.02)
    assert not alive(child)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
