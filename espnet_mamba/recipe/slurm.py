"""The Slurm backend: submit an array, wait for its exit status files, say what it is doing, cancel it on Ctrl-C."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from espnet_mamba.data.files import read_json, write_json, write_text
from espnet_mamba.recipe.jobs import MEMORY_REMEDY, Jobs, Resources, check_failures, exit_reason
from espnet_mamba.recipe.slurm_conf import SlurmConf
from espnet_mamba.recipe.slurm_script import batch_script, rc_path

LOOK_SECONDS = 0.5  # between looks for exit status files and new lines of the log
GRACE_POLLS = 2  # a job has ended, but a network file system may still hold its files back
WARNING_SECONDS = 120  # before its time limit a resumable job is told to save
ENDED = {
    "COMPLETED": "it ended without leaving its exit status; is its folder writable on the node?",
    "FAILED": "it failed before it could leave its exit status",
    "CANCELLED": "it was cancelled",
    "TIMEOUT": 'it went over its time limit; give it more, e.g. --job_args "--time 72:00:00", or in slurm.conf',
    "OUT_OF_MEMORY": f"killed by Slurm, {MEMORY_REMEDY}",
    "NODE_FAIL": "its node failed",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "it missed its deadline",
    "PREEMPTED": "it was preempted, and the cluster does not requeue",
}
FIRST_ERROR = re.compile(r"^srun: error: (\S+: tasks? [^\n]*)", re.MULTILINE)
GONE = "Slurm no longer knows it, and it left no exit status; was its node lost, or its folder not writable there?"


def run_slurm(jobs: Jobs, resources: Resources, conf: SlurmConf, poll_seconds: float = 10.0) -> None:
    """Run an array through Slurm and wait for it; an array that an interrupted wait left running is waited for anew.

    Raises:
        ValueError: sbatch is missing or refuses, or another command of this name is still running there.
        JobsFailedError: names each failed job, why, and its log; the others have finished.
    """
    if shutil.which(conf.command[0]) is None:
        raise ValueError(
            f"{conf.command[0]} is not on this machine: cmd_backend=slurm needs Slurm's commands; run on a machine "
            "of the cluster that submits jobs, or use cmd_backend=local"
        )
    script = batch_script(jobs, resources, Path.cwd())
    job_id = _still_running(jobs, script) or _submit(jobs, resources, conf, script)
    try:
        failures = _Wait(jobs, job_id, poll_seconds).run()
    except BaseException:  # also KeyboardInterrupt
        print(f"cancelling slurm job {job_id}", flush=True)
        subprocess.run(["scancel", job_id], check=False)
        _record(jobs).unlink(missing_ok=True)
        raise
    _record(jobs).unlink(missing_ok=True)
    check_failures(jobs, failures)


def _submit(jobs: Jobs, resources: Resources, conf: SlurmConf, script: str) -> str:
    """Write the script, submit it, and return Slurm's number of it."""
    for number in jobs.numbers:
        rc_path(jobs, number).unlink(missing_ok=True)
        jobs.log_of(number).unlink(missing_ok=True)
    path = rc_path(jobs, 0).with_name(f"{jobs.name}.sh")
    write_text(path, script)
    result = subprocess.run([*_sbatch(jobs, resources, conf), str(path)], capture_output=True, text=True)
    if result.returncode:
        said = " ".join(result.stderr.replace("sbatch: error: ", "").split())
        raise ValueError(f"sbatch refused the job {jobs.name}: {said}; {_partitions()}mend {conf.path} or --job_args")
    job_id = result.stdout.strip().split(";")[0]
    write_json(_record(jobs), {"job_id": job_id, "script": script})
    print(f"slurm job {job_id} ({jobs.name}): submitted; log: {jobs.log}", flush=True)
    return job_id


def _sbatch(jobs: Jobs, resources: Resources, conf: SlurmConf) -> list[str]:
    given = {"gpu": str(resources.gpu), "num_threads": str(resources.num_threads)}
    for name, value, needed in (
        ("name", jobs.name, False),
        ("num_nodes", str(resources.num_nodes), resources.num_nodes > 1),
    ):
        if needed or conf.knows(name):  # Kaldi's own file has no line for them
            given[name] = value
    given |= {key: value for key, value in (("mem", resources.mem), ("time", resources.time)) if value}
    log = str(jobs.log).replace("%", "%%")
    words = conf.words(given) + ["--parsable", "--requeue", "--open-mode=append", f"--chdir={Path.cwd()}"]
    words.append(f"--output={log.replace(jobs.variable, '%a') if jobs.variable else log}")
    if jobs.variable:
        at_a_time = f"%{resources.max_jobs}" if resources.max_jobs else ""
        words.append(f"--array={jobs.first}-{jobs.last}{at_a_time}")
    if resources.tasks > 1:
        words += [f"--ntasks={resources.tasks}", f"--ntasks-per-node={resources.tasks_per_node}"]
    if jobs.resumable:
        words.append(f"--signal=B:USR1@{WARNING_SECONDS}")
    return words


def _record(jobs: Jobs) -> Path:
    """Return the file that remembers a submitted array while it is waited for."""
    return rc_path(jobs, 0).with_name(f"{jobs.name}.job.json")


def _still_running(jobs: Jobs, script: str) -> str:
    """Return the number of the array if a wait that was killed left it there, running or well done; else "".

    Raises:
        ValueError: what is still running is another command.
    """
    if not _record(jobs).is_file():
        return ""
    record = read_json(_record(jobs))
    if record["script"] != script:
        refuse_running(jobs.log, jobs.name)
        return ""
    if not _runs(record["job_id"]) and any(_status(jobs, number) != 0 for number in jobs.numbers):
        return ""
    print(f"slurm job {record['job_id']} ({jobs.name}): taken up again", flush=True)
    return record["job_id"]


def refuse_running(log: Path, name: str) -> None:
    """Raise when a job of that log and name, which nobody waits for, still runs: two must not meet in one folder.

    Raises:
        ValueError: names the job and how to end it.
    """
    record = log.parent / "q" / f"{name}.job.json"
    job_id = read_json(record)["job_id"] if record.is_file() else ""
    if job_id and _runs(job_id):
        raise ValueError(
            f"slurm job {job_id} ({name}) still runs, with other options; wait for it, or: scancel {job_id}"
        )


def _runs(job_id: str) -> bool:
    return any(state not in ENDED for state, _ in (queue_states(job_id) or {}).values())


def queue_states(job_id: str) -> dict[int, tuple[str, str]] | None:
    """Return each job's (state, reason) as squeue has it, by its number in the array (1 for a single job).

    Empty when Slurm has forgotten the array; None when Slurm's controller does not answer.
    """
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-r", "-t", "all", "-j", job_id, "-o", "%K|%T|%r"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {} if "Invalid job id" in result.stderr else None
    rows = [line.split("|") for line in result.stdout.splitlines()]
    return {int(number) if number.isdigit() else 1: (state, reason) for number, state, reason in rows}


def _first_srun_error(log: Path) -> str:
    """Return what srun said of the first process to fail, if it ran several: its own status is the largest of all."""
    try:
        said = FIRST_ERROR.search(log.read_text(errors="replace"))
    except FileNotFoundError:
        return ""
    killed = said and ("Killed" in said[1] or "Out Of Memory" in said[1])
    return f"{said[1]}{f', {MEMORY_REMEDY}' if killed else ''}" if said else ""


def _status(jobs: Jobs, number: int) -> int | None:
    """Return the exit status that a job has left, if it has ended."""
    try:
        return int(rc_path(jobs, number).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _partitions() -> str:
    names = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True).stdout.split()
    return f"partitions here: {' '.join(sorted(set(names)))}; " if names else ""


class _Wait:
    """Waiting for one array."""

    def __init__(self, jobs: Jobs, job_id: str, poll_seconds: float) -> None:
        self.jobs, self.job_id, self.poll_seconds = jobs, job_id, poll_seconds
        self.open = set(jobs.numbers)
        self.failures: dict[int, str] = {}
        self.ended_at: dict[int, float] = {}  # when a job without an exit status was first seen to have ended
        self.shown, self.read = "", 0

    def run(self) -> dict[int, str]:
        """Wait until each job has left its exit status or cannot any more; return the failed ones' reasons."""
        next_poll = 0.0
        while self.open:
            self._collect()
            if self.open and time.monotonic() >= next_poll:
                self._poll()
                next_poll = time.monotonic() + self.poll_seconds
            self._follow_log()
            if self.open:
                time.sleep(LOOK_SECONDS)
        self._follow_log()
        return self.failures

    def _collect(self) -> None:
        for number in sorted(self.open):
            status = _status(self.jobs, number)
            if status is None:
                continue
            self.open.discard(number)
            if status:
                self.failures[number] = _first_srun_error(self.jobs.log_of(number)) or exit_reason(status)

    def _poll(self) -> None:
        states = queue_states(self.job_id)
        if states is None:
            return self._show("Slurm does not answer; waiting")
        for number in sorted(self.open):
            state, _ = states.get(number, ("", ""))
            if state and state not in ENDED:
                self.ended_at.pop(number, None)
            elif (
                time.monotonic() - self.ended_at.setdefault(number, time.monotonic()) > GRACE_POLLS * self.poll_seconds
            ):
                self.open.discard(number)
                self.failures[number] = ENDED.get(state, GONE)
        waiting = [
            f"{s.lower()} ({r})" if s == "PENDING" else s.lower() for n, (s, r) in states.items() if n in self.open
        ]
        done = len(self.jobs.numbers) - len(self.open)
        parts = [f"{count} {state}" for state, count in sorted(Counter(waiting).items())]
        self._show(", ".join(parts + [f"{done} ended"] * bool(self.jobs.variable)))
        return None

    def _show(self, text: str) -> None:
        if text != self.shown:
            print(f"slurm job {self.job_id} ({self.jobs.name}): {text}", flush=True)
        self.shown = text

    def _follow_log(self) -> None:
        """Pass on what a single job has written since the last look."""
        if self.jobs.variable or not self.jobs.log.is_file():
            return
        with self.jobs.log.open("rb") as handle:
            handle.seek(self.read)
            block = handle.read()
        self.read += len(block)
        sys.stdout.write(block.decode(errors="replace"))
        sys.stdout.flush()
