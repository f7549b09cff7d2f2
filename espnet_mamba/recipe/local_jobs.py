"""The local backend: the jobs of an array as processes of this machine, a few at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from espnet_mamba.recipe.jobs import Jobs, Resources, check_failures, exit_reason


def run_local(jobs: Jobs, resources: Resources) -> None:
    """Run all jobs, ``resources.max_jobs`` at a time (0: as many as the machine has cores for their threads).

    A failed job does not stop the others. On Ctrl-C the running ones are ended and no further one starts.

    Raises:
        JobsFailedError: names each failed job and its log.
        ValueError: several nodes were asked for.
    """
    if resources.num_nodes > 1:
        raise ValueError(f"--num_nodes {resources.num_nodes}: cmd_backend=local is one machine; use cmd_backend=slurm")
    at_a_time = resources.max_jobs or max(1, (os.cpu_count() or 1) // resources.num_threads)
    running: set[subprocess.Popen[bytes]] = set()
    stop = threading.Event()

    def run(number: int) -> int:
        environment = os.environ | {"OMP_NUM_THREADS": str(resources.num_threads)}
        log = jobs.log_of(number)
        log.parent.mkdir(parents=True, exist_ok=True)
        if stop.is_set():
            return -signal.SIGTERM
        streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
        with Path(log).open("wb") as handle:
            child = subprocess.Popen(
                jobs.command_of(number), **streams, stdout=handle, env=environment, start_new_session=True
            )
        running.add(child)
        if stop.is_set():  # Ctrl-C fell between the two lines above
            _end(child)
        status = child.wait()
        running.discard(child)
        return status

    with ThreadPoolExecutor(at_a_time) as pool:
        futures = {number: pool.submit(run, number) for number in jobs.numbers}
        try:
            statuses = {number: future.result() for number, future in futures.items()}
        except BaseException:  # also KeyboardInterrupt: nothing may run on
            stop.set()
            for child in list(running):
                _end(child)
            raise
    check_failures(jobs, {number: exit_reason(status) for number, status in statuses.items() if status})


def _end(child: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(child.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it has just ended
