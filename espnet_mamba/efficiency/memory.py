"""The peak memory of one call: the kernel's own high-water mark, reset before it, or CUDA's allocator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

_MIB = 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory_mb(call: Callable[[], object], device: str = "cpu") -> tuple[float, float]:
    """Run ``call`` and return (peak, peak above the state before it) in MiB.

    On a CPU the resident set of the process; on CUDA the bytes that PyTorch's allocator held.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        return peak / _MIB, (peak - before) / _MIB
    _give_back_freed_memory()
    with _blocks_of_their_own():
        before = _resident_bytes()
        peak = _peak_by_high_water_mark(call) if _reset_high_water_mark() else _peak_by_sampling(call)
    return peak / _MIB, max(0, peak - before) / _MIB


def _give_back_freed_memory() -> None:
    """Blocks that the allocator keeps from an earlier, longer call would hide what this one needs."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # not glibc: the peak is then an upper limit


@contextlib.contextmanager
def _blocks_of_their_own() -> Iterator[None]:
    """Let every block above 128 KiB be mapped and unmapped by itself (glibc).

    Else the order of calls is measured too: freed blocks of up to 32 MiB stay in the heap, and what comes next
    fits into the gaps or does not. Afterwards blocks come from the heap again, as in any process that has run a while.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        yield
        return
    mallopt(_MMAP_THRESHOLD, 128 * 1024)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 * _MIB)
        mallopt(_TRIM_THRESHOLD, 64 * _MIB)


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _reset_high_water_mark() -> bool:
    """Set VmHWM to the present resident set (Linux, proc(5)); False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_by_high_water_mark(call: Callable[[], object]) -> int:
    call()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return _resident_bytes()


def _peak_by_sampling(call: Callable[[], object]) -> int:
    """Look at the resident set every millisecond while ``call`` runs; short peaks may be missed."""
    done = threading.Event()
    peaks = [_resident_bytes()]

    def watch() -> None:
        while not done.wait(0.001):
            peaks[0] = max(peaks[0], _resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return max(peaks[0], _resident_bytes())
