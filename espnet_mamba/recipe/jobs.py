"""Arrays of jobs under the contract that ESPnet and Kaldi users know from run.pl and slurm.pl.

``[--gpu n --mem 4G --time 1:00:00 --num_threads n --max_jobs k] [JOB=1:n] log.JOB command ... JOB ...``
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RANGE = re.compile(r"(?P<variable>[A-Za-z_]\w*)=(?P<first>\d+):(?P<last>\d+)")
# What shapes a command and may not reach another machine by itself.
EXPORTED = ("PATH", "PYTHONPATH", "NLTK_DATA", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE", "PYTHONUNBUFFERED")
EXPORTED += ("TOKENIZERS_PARALLELISM", "ESPNET_MAMBA_BACKEND")
MEMORY_REMEDY = (
    'most often because it went over its memory: ask for more, e.g. --job_args "--mem 16G", or in slurm.conf; '
    "or lower batch_bins or --nj"
)
KILLED = 128 + 9


class JobsFailedError(RuntimeError):
    """One or more jobs of an array failed; the others have finished."""


@dataclass(frozen=True)
class Resources:
    """What each job of an array asks for; ``max_jobs`` 0 means all at once."""

    gpu: int = 0  # per node
    mem: str = ""  # as Slurm reads it, e.g. 4G, per CPU or per node as slurm.conf has it
    time: str = ""  # as Slurm reads it, e.g. 1-00:00:00
    num_threads: int = 1  # per task
    num_nodes: int = 1
    tasks_per_node: int = 1
    max_jobs: int = 0

    @property
    def tasks(self) -> int:
        """Processes of one job, over all its nodes."""
        return self.num_nodes * self.tasks_per_node


@dataclass(frozen=True)
class Jobs:
    """The same command for the numbers ``first .. last``; ``variable`` in its words and its log's name is the number.

    ``variable`` is empty for one single job.
    """

    name: str
    log: Path
    command: tuple[str, ...]
    variable: str = ""
    first: int = 1
    last: int = 1
    resumable: bool = False  # killed and run again it goes on where it was
    done: tuple[Path, ...] = ()  # a resumable job that ended well without these files was interrupted

    @property
    def numbers(self) -> range:
        """The numbers of the array's jobs."""
        return range(self.first, self.last + 1)

    def log_of(self, number: int | str) -> Path:
        """Return the log of one job."""
        text = str(self.log)
        return Path(text.replace(self.variable, str(number)) if self.variable else text)

    def command_of(self, number: int) -> list[str]:
        """Return the words of one job's command."""
        if not self.variable:
            return list(self.command)
        return [word.replace(self.variable, str(number)) for word in self.command]


def parse_jobs(words: Sequence[str], name: str, resumable: bool = False, done: Sequence[Path] = ()) -> Jobs:
    """Read ``[JOB=1:n] log command ...``.

    Raises:
        ValueError: no log or no command, an empty range, or a log that all jobs would share.
    """
    words = list(words)
    match = RANGE.fullmatch(words[0]) if words else None
    if match:
        words.pop(0)
    if len(words) < 2:
        raise ValueError("a job needs a log and a command: [JOB=1:n] log.JOB command ...")
    log, command = Path(words[0]).absolute(), tuple(words[1:])
    if not match:
        return Jobs(name, log, command, resumable=resumable, done=tuple(done))
    variable, first, last = match["variable"], int(match["first"]), int(match["last"])
    if last < first or first < 1:
        raise ValueError(f"{match[0]}: an empty range; it must be 1 <= first <= last, e.g. {variable}=1:4")
    if variable not in str(log) and last > first:
        raise ValueError(f"{log}: all jobs would share this log; put {variable} into its name, e.g. log.{variable}")
    return Jobs(name, log, command, variable, first, last, resumable, tuple(done))


def exports() -> str:
    """Return shell lines that set up this process's environment on another machine, as far as commands need it."""
    return "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in EXPORTED if name in os.environ)


def exit_reason(status: int) -> str:
    """Say what an exit status means and, where there is one, the remedy."""
    if status == KILLED or status == -9:
        return f"killed (signal 9), {MEMORY_REMEDY}"
    return f"exit status {status}"


def check_failures(jobs: Jobs, failures: Mapping[int, str]) -> None:
    """Raise when a job failed, naming each with its reason and log.

    Raises:
        JobsFailedError: ``failures`` (job number -> reason) is not empty.
    """
    if not failures:
        return
    named = [f"{f'job {n}: ' if jobs.variable else ''}{failures[n]}; log: {jobs.log_of(n)}" for n in sorted(failures)]
    more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
    count = f"{len(failures)} of {len(jobs.numbers)} jobs failed: " if jobs.variable else "the job failed: "
    raise JobsFailedError(f"{jobs.name}: {count}{'; '.join(named[:5])}{more}")
