"""Runs a few long jobs in processes of their own, each with a log, and relays one line of progress for each."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TAIL = 4000  # bytes of a log that are looked at for progress and shown when a job fails


@dataclass(frozen=True)
class Job:
    """One call of ``target(*args)``; all it prints goes to ``log``."""

    name: str
    target: Callable[..., None]
    log: Path
    args: tuple[Any, ...] = ()


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    started: float = field(default_factory=time.monotonic)


def run_jobs(
    jobs: list[Job],
    nj: int,
    progress: Callable[[str], str | None],
    *,
    use_gpu: bool = False,
    every: float = 10.0,
) -> None:
    """Run ``jobs``, at most ``nj`` at once, and print what ``progress`` finds in the tail of each log.

    Each computes with its share of the cores, whatever OMP_NUM_THREADS says: threads of several processes on one core
    wait for each other. Processes are forked, so that they share what the caller has imported (which must not have
    computed with several threads before: OpenMP's do not survive a fork); with ``use_gpu`` they start afresh, because
    CUDA does not survive it either. Raises ValueError with the last lines of its log when a job
    fails; the others are then stopped, and resume when the command is run again.
    """
    context = multiprocessing.get_context("spawn" if use_gpu else "fork")
    waiting, running = list(jobs), []
    threads = threads_per_job(min(len(jobs), max(1, nj)))
    reported = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < max(1, nj):
                job = waiting.pop(0)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                process = context.Process(target=_run, args=(job, os.getpid(), threads), name=job.name)
                process.start()
                running.append(_Running(job, process))
            running[0].process.join(0.2)
            running = [entry for entry in running if not _finished(entry)]
            if time.monotonic() - reported >= every:
                reported = time.monotonic()
                _report(running, progress)
    finally:
        for entry in running:
            entry.process.terminate()
            entry.process.join()


def threads_per_job(num_jobs: int) -> int:
    """Return the threads for each of ``num_jobs`` processes that run at once: its share of the cores, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // max(1, num_jobs))


def _use_threads(number: int) -> None:
    """Hold for a torch that is imported later and for grandchildren, and for a torch that is already here."""
    os.environ["OMP_NUM_THREADS"] = str(number)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(number)


def _run(job: Job, parent: int, threads: int) -> None:
    """Be the child: send everything printed, also by libraries, to the log, then call the target."""
    _end_with(parent)
    _use_threads(threads)
    handle = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(handle), "w", buffering=1) for _ in range(2))
    logging.getLogger().handlers.clear()  # the caller's write to its own streams, and the libraries add theirs
    try:
        job.target(*job.args)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _end_with(parent: int) -> None:
    """Ask Linux to end this process when its parent dies: an orphan would write into the folder of the next run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise SystemExit(1)


def _finished(entry: _Running) -> bool:
    if entry.process.is_alive():
        return False
    entry.process.join()
    seconds = time.monotonic() - entry.started
    if entry.process.exitcode:
        lines = log_tail(entry.job.log).splitlines()[-15:]
        raise ValueError(
            f"{entry.job.name} failed (exit status {entry.process.exitcode}) after {seconds:.0f} s; "
            f"the end of {entry.job.log}:\n" + "\n".join(f"  {line}" for line in lines)
        )
    print(f"{entry.job.name}: done in {seconds:.0f} s", flush=True)
    return True


def _report(running: list[_Running], progress: Callable[[str], str | None]) -> None:
    for entry in running:
        text = progress(log_tail(entry.job.log, 20 * TAIL)) if entry.job.log.exists() else None
        print(f"{entry.job.name}: {text or 'starting'} ({time.monotonic() - entry.started:.0f} s)", flush=True)


def log_tail(path: Path, size: int = TAIL) -> str:
    """Return the last ``size`` bytes of a log, carriage returns (progress bars) as line ends."""
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return handle.read().decode("utf-8", errors="replace").replace("\r", "\n")
