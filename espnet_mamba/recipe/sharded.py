"""The targets stages as jobs: an array that samples, one job that fits, an array that labels, one that merges.

Where the jobs run is the launcher's business: ``bin/run_job.py``, on this machine or through Slurm.
"""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

NUMBER = "SHARD__"  # stands for a job's number; JOB, as usual, might be part of a path
ARRAYS = ("sample", "label")
PR_SET_PDEATHSIG = 1  # Linux, prctl(2)
STEPS = ("sample", "fit", "label", "merge")


class StepFailedError(RuntimeError):
    """A step was not finished by all of its jobs."""


def run_steps(
    launcher: Sequence[str],
    command: Sequence[str],
    count: int,
    log_dir: Path,
    pending: Callable[[str], Sequence[int]],
) -> None:
    """Run the steps, each when the one before is finished; a step with nothing to do starts no job.

    Args:
        launcher: words that ``[JOB=1:n] log command`` is added to.
        command: that each job runs, with ``--step`` and the like added.
        count: of shards.
        log_dir: where each job's log goes.
        pending: returns the numbers of the shards that a step still has to do.

    Raises:
        StepFailedError: names each shard that is missing, its log, and the command that does it alone.
    """
    for step in STEPS:
        before = pending(step)
        if not before:
            print(f"{step}: done already", flush=True)
            continue
        log, words = _job(step, command, count, log_dir)
        missing = f", {len(before)} to do" if len(before) < count else ""
        print(f"{step}: {f'{count} jobs{missing}' if step in ARRAYS else 'one job'}; log: {log}", flush=True)
        status = _run([*launcher, "--name", step, *words])
        left = [] if step == "merge" else pending(step)
        if status or left:
            raise StepFailedError(_failure(step, left, command, count, log, status))


def _run(words: Sequence[str]) -> int:
    """Run the launcher and return its exit status; on Ctrl-C tell it once, and wait till it has ended its jobs."""
    child = subprocess.Popen(words, start_new_session=True, preexec_fn=_end_with_parent)
    try:
        return child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise


def _end_with_parent() -> None:
    """Ask Linux to tell the launcher when this process is killed: what it runs would go on, unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _job(step: str, command: Sequence[str], count: int, log_dir: Path) -> tuple[Path, list[str]]:
    """Return a step's log, and the words that the launcher is given."""
    if step not in ARRAYS:
        log = log_dir / f"{step}.log"
        return log, ["--gpu", "0", str(log), *command, "--step", step, "--nj", str(count)]
    log = log_dir / f"{step}.{NUMBER}.log"
    return log, [f"{NUMBER}=1:{count}", str(log), *command, "--step", step, "--shard", f"{NUMBER}/{count}"]


def _failure(step: str, left: Sequence[int], command: Sequence[str], count: int, log: Path, status: int) -> str:
    again = "run the stage again: what is finished is kept"
    if step not in ARRAYS or not left:
        return f"{step} failed with exit status {status}; log: {log}; {again}"
    named = []
    for number in left[:5]:
        _, words = _job(step, command, count, log.parent)
        alone = shlex.join(word.replace(NUMBER, str(number)) for word in words[2:])
        named.append(f"shard {number}: log: {str(log).replace(NUMBER, str(number))}; alone: {alone}")
    more = [f"and {len(left) - 5} more"] * (len(left) > 5)
    return "\n  ".join([f"{step}: {len(left)} of {count} shards are not finished; {again}", *named, *more])
