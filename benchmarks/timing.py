"""Times candidates fairly: interleaved rounds in shuffled order, medians and quartiles; memory in a process of its own.

Forward is one call without gradients. Forward+backward is one call with them and the gradients of all its inputs.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espnet_mamba.efficiency.memory import peak_memory_mb

PASSES = ("forward", "forward+backward")
SECONDS_PER_CANDIDATE = 60.0  # a candidate gets fewer rounds when all of them would take longer than this


class Job(NamedTuple):
    """A candidate with its inputs: what to call, and what to differentiate in."""

    call: Callable[[], Tensor | Sequence[Tensor]]
    leaves: Sequence[Tensor]
    grad: Tensor | Sequence[Tensor]  # of the output
    compiles: bool = False  # in its first call, which then says nothing about the next

    def run(self, which: str) -> Any:
        """Run one pass, and return its results so that they count as memory in use."""
        if which == "forward":
            with torch.no_grad():
                return self.call()
        y = self.call()
        return y, torch.autograd.grad(y, self.leaves, self.grad)


@dataclass
class Times:
    """Seconds of one pass of one candidate."""

    seconds: list[float] = field(default_factory=list)
    note: str = ""  # why there are none, or how they came about

    @property
    def median(self) -> float:
        """The median, NaN if nothing was measured."""
        return statistics.median(self.seconds) if self.seconds else float("nan")

    def cell(self) -> str:
        """Return ``median [first quartile, third quartile]`` in milliseconds."""
        if not self.seconds:
            return "-"
        ms = [1e3 * value for value in self.seconds]
        if len(ms) == 1:
            return f"{number(ms[0])}"
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive")
        return f"{number(1e3 * self.median)} [{number(low)}, {number(high)}]"


def number(value: float) -> str:
    """Return three significant digits without an exponent."""
    if value != value:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def time_interleaved(
    jobs: dict[str, Job], which: str, rounds: int, device: str, seconds: float = SECONDS_PER_CANDIDATE
) -> dict[str, Times]:
    """Time one pass of every job: a warm-up, then ``rounds`` rounds, each of which runs every job once.

    The order is shuffled anew in each round, so that a busy spell of the machine, or what a neighbour left in the
    caches, does not always fall on the same job. A job that took t seconds in its warm-up gets ``seconds / t`` rounds
    at most; where that is less than one, the warm-up is its round.
    """
    times = {name: Times() for name in jobs}
    left = {}
    for name, job in jobs.items():
        try:
            first = wall_time(job, which, device)
            slow = first > seconds / 10 and not job.compiles  # what is loaded once is nothing beside that
            warm = first if slow else wall_time(job, which, device)
        except Exception as error:  # a peer that fails must not end the benchmark of the others
            times[name].note = f"failed: {type(error).__name__}: {_first_line(error)}"
            continue
        left[name] = min(rounds, int(seconds / warm))
        if left[name] < 1:
            times[name].seconds.append(warm)
    generator = random.Random(0)
    for done in range(rounds):
        names = [name for name in left if left[name] > done]
        generator.shuffle(names)
        for name in names:
            times[name].seconds.append(wall_time(jobs[name], which, device))
    return times


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else ""


def wall_time(job: Job, which: str, device: str) -> float:
    """Return the seconds that one pass took."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    results = job.run(which)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del results
    return elapsed


def peak_memory(
    build: Callable[..., Job], arguments: tuple, passes: Sequence[str], threads: int, device: str
) -> dict[str, float]:
    """Return the peak above the state before of each pass of ``build(*arguments)``, MiB; empty if that failed.

    Measured in a fresh process, where nothing that ran before can hide or add memory. Results and gradients count,
    inputs do not. The second call is measured: the first one loads and compiles.
    """
    # Not a fork: OpenMP's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_peaks, build, arguments, passes, threads, device).result()
        except Exception as error:  # out of memory, and the process is gone
            print(f"memory of {arguments}: {type(error).__name__}: {_first_line(error)}", file=sys.stderr, flush=True)
            return {}


def _peaks(
    build: Callable[..., Job], arguments: tuple, passes: Sequence[str], threads: int, device: str
) -> dict[str, float]:
    torch.set_num_threads(threads)
    job = build(*arguments)
    peaks = {}
    for which in passes:
        job.run(which)
        gc.collect()
        peaks[which] = peak_memory_mb(functools.partial(job.run, which), device)[1]
    return peaks


def release_memory() -> None:
    """Give freed memory back to the system, so that ``available_mb`` and other processes see it."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc


def available_mb(device: str) -> float:
    """Return the memory of a device that is free for use, MiB; unlimited where the system does not say."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0] / 2**20
    return _meminfo_mb("MemAvailable:")


def _meminfo_mb(key: str) -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), float("inf"))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with columns of even width; all but the first are aligned to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def machine(device: str) -> str:
    """Return a Markdown list: processor, memory, versions, and the kernels that ``auto`` means here."""
    memory = _meminfo_mb("MemTotal:") / 1024
    lines = [
        f"processor: {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {memory:.0f} GiB",
        f"load average before: {os.getloadavg()[0]:.2f}" if hasattr(os, "getloadavg") else "",
        f"system: {platform.system()} {platform.release()} {platform.machine()}",
        "versions: Python " + platform.python_version() + ", " + ", ".join(_versions()),
        f"compiler: {_compiler()}",
        f"kernels: {_kernels()}",
    ]
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(device)
        size = card.total_memory / 2**30
        lines.append(f"GPU: {card.name}, {card.multi_processor_count} SMs, {size:.0f} GiB, CUDA {torch.version.cuda}")
    return "\n".join(f"- {line}" for line in lines if line)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> list[str]:
    versions = []
    for name in ("torch", "triton", "transformers", "mambapy", "mamba-ssm", "causal-conv1d"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return versions


def _compiler() -> str:
    try:
        done = subprocess.run([os.environ.get("CC", "cc"), "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.splitlines()[0] if done.stdout else "none"


def _kernels() -> str:
    from espnet_mamba.ops import compiled

    reason = compiled.unavailable_reason()
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"not available ({reason})" if reason else compiled.runnable_variants()[0]
    return f"compiled CPU kernels {found}; PyTorch's own {capability}"
