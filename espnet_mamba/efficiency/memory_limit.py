"""How much memory is left, and a wall before the end of it: an error in this process, not a killed machine."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_MIB = 2**20
_CGROUP = Path("/sys/fs/cgroup")
MEMORY_SHARE = 0.85  # of what is available: other programs and the prediction's error need the rest


def available_memory_mb(device: str = "cpu") -> float:
    """Return MiB that this process can still take: of the machine, of its control group, or of the GPU.

    Infinite where the system does not say.
    """
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (free + cached) / _MIB
    return min(_machine_mb(), _group_mb())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed: Python's, CUDA's, or that of PyTorch's CPU allocator."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad alloc", "bad_alloc")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


@contextlib.contextmanager
def limited_memory(megabytes: float, device: str = "cpu") -> Iterator[None]:
    """Let allocations beyond ``megabytes`` MiB more than now fail with an error (Linux, CPU), if that is known.

    The limit is on private data (RLIMIT_DATA), not on addresses: mapped files and libraries do not count.
    """
    held = _status_kb("VmData")
    if device.startswith("cuda") or held is None or megabytes == float("inf"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(held * 1024 + megabytes * _MIB)
    allowed = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _machine_mb() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    values = [float(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")]
    return values[0] if values else float("inf")


def _group_mb() -> float:
    """Return what the control group (a container's limit) leaves; its page cache can be given back."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return float("inf")
    if limit == "max":
        return float("inf")
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0))) / _MIB


def _status_kb(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) for line in lines if line.startswith(f"{key}:")]
    return values[0] if values else None
