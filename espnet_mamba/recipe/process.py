"""Run a stage's command: its output to the screen and a log, its peak memory watched, ended with us on Ctrl-C."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


@contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold a lock on ``path`` while in the block; the system frees it when this process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise ValueError(f"{what} is being run by process {handle.read() or '?'}; wait for it or end it") from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def run_logged(command: Sequence[str], log: Path) -> tuple[int, float]:
    """Run ``command`` in a session of its own; return its exit status and the peak of its processes' memory in MB.

    Memory is the sum of resident sets over the process and its descendants, sampled every 0.2 s (pages that processes
    share count for each of them).
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    peak = [0.0]
    done = threading.Event()
    with log.open("wb") as handle:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, **streams, start_new_session=True, preexec_fn=_die_with_parent)
        watcher = threading.Thread(target=_watch_memory, args=(child.pid, peak, done), daemon=True)
        watcher.start()
        try:
            while block := os.read(child.stdout.fileno(), 65536):
                handle.write(block)
                handle.flush()
                sys.stdout.buffer.write(block)
                sys.stdout.buffer.flush()
            status = child.wait()
        except BaseException:  # also KeyboardInterrupt: nothing of the stage may run on
            os.killpg(child.pid, signal.SIGTERM)
            child.wait()
            raise
        finally:
            done.set()
    watcher.join()
    return status, peak[0]


def _die_with_parent() -> None:
    """Ask Linux to kill this process when the one that started it is killed: else two runs could meet in one folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _watch_memory(root: int, peak: list[float], done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        peak[0] = max(peak[0], _family_memory_mb(root))


def _family_memory_mb(root: int) -> float:
    """Return the resident memory of a process and all its descendants; 0 where there is no /proc."""
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            pages[pid] = int(fields[21])
        except (OSError, IndexError, ValueError):
            continue  # the process ended while we looked
    total, family = 0, [root]
    while family:
        pid = family.pop()
        total += pages.get(pid, 0)
        family += children.get(pid, [])
    return total * os.sysconf("SC_PAGE_SIZE") / 1e6
