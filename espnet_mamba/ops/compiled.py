"""The compiled CPU kernels: found in the installed package, or compiled once with the system's compiler into a cache.

Each instruction set is a shared library of its own, so that no library ever holds an instruction that the processor in
use lacks: AVX-512, AVX2, and plain (SSE2 on x86, NEON on Arm). PyTorch's own test of the processor decides, and with it
its variable ``ATEN_CPU_CAPABILITY``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from espnet_mamba.ops.kernel_flags import FLAGS, VARIANTS

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
COMPILE_SECONDS = 120


class CompileError(RuntimeError):
    """The kernels could not be compiled; the message says why in one line."""


def library(variant: str | None = None) -> ctypes.CDLL | None:
    """Return the kernels for this processor, compiled now if need be, or None with one line in the log.

    Args:
        variant: a key of ``VARIANTS`` instead of the best that the processor can run.

    Raises:
        ValueError: the processor cannot run the variant that was asked for.
    """
    if variant is not None and variant not in runnable_variants():
        raise ValueError(f"variant {variant!r} is not one that this processor runs: {' '.join(runnable_variants())}")
    return _load(variant or runnable_variants()[0])


def unavailable_reason() -> str:
    """Return why ``library()`` is None, or an empty string."""
    return "" if library() is not None else _reasons.get(runnable_variants()[0], "")


def runnable_variants() -> list[str]:
    """Return the variants that this processor can run, best first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["plain"]
    capability = torch.backends.cpu.get_cpu_capability()
    return list(VARIANTS)[{"AVX512": 0, "AVX2": 1}.get(capability, 2) :]


def cache_folder() -> Path:
    """Return where compiled kernels are kept: ``$ESPNET_MAMBA_CACHE``, else the user's cache folder."""
    named = os.environ.get("ESPNET_MAMBA_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espnet_mamba"


_reasons: dict[str, str] = {}


@functools.cache
def _load(variant: str) -> ctypes.CDLL | None:
    built = Path(__file__).parent / f"_cpu_{variant}.so"  # made by setup.py
    try:
        return ctypes.CDLL(str(built if built.exists() else compile_cached(variant)))
    except (CompileError, OSError) as error:
        _reasons[variant] = str(error)
        log.warning("CPU kernels are not available, PyTorch is used instead (several times slower): %s", error)
        return None


def compile_cached(variant: str) -> Path:
    """Return the library of one variant from the cache, compiled first if it is not there.

    The name holds a digest of sources, flags and compiler, so a change of any of them compiles anew. Several processes
    may do this at once: each compiles under a name of its own and renames.

    Raises:
        CompileError: no compiler, it failed, or no folder to write to.
    """
    compiler = _compiler()
    digest = hashlib.sha256(" ".join([*FLAGS, *VARIANTS[variant], _version(compiler)]).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    name = f"cpu_{variant}_{digest.hexdigest()[:16]}.so"
    folder = _writable_cache()
    if not (folder / name).exists():
        log.info("compiling the CPU kernels (%s) once into %s", variant, folder)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            output = Path(temporary) / name
            compile_library(compiler, variant, output)
            output.replace(folder / name)
    return folder / name


def compile_library(compiler: str, variant: str, output: Path) -> None:
    """Compile all C sources into one shared library, with OpenMP where the compiler has it.

    Raises:
        CompileError: the compiler failed; its first error line is in the message.
    """
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    message = "no compiler output"
    for threads in (["-fopenmp"], []):
        command = [compiler, *FLAGS, *threads, *VARIANTS[variant], "-o", str(output), *sources, "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CompileError(f"{compiler}: {error}") from error
        if done.returncode == 0:
            return
        message = next((line for line in done.stderr.splitlines() if "error" in line), message)
    raise CompileError(f"{compiler} failed: {message}")


def _compiler() -> str:
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        if name and shutil.which(name):
            return name
    raise CompileError("no C compiler (looked for $CC, cc, gcc, clang)")


def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{compiler}: {error}") from error
    return done.stdout


def _writable_cache() -> Path:
    """Return the cache folder, or one of this process alone if that cannot be written."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        log.warning("%s cannot be written (%s): compiling for this process only", folder, error)
        return Path(tempfile.mkdtemp(prefix="espnet_mamba_"))
