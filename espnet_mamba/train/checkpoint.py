"""The state of a training run as one file: tensors and plain values, then a digest of every byte before it.

The digest is the file's last line, so the two cannot come apart: one rename brings both. ``torch.load`` reads the file
as it stands, since a zip archive may have text behind it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

FOOTER = b"\nespnet-mamba training state, sha256 %s\n"
FOOTER_BYTES = len(FOOTER) - len(b"%s") + 64
BLOCK = 1 << 22  # bytes read at a time


class DamagedCheckpointError(ValueError):
    """A file that is not, or no longer, what ``write_state`` wrote."""


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path`` with its digest, and sync it; not atomic by itself (see ``CheckpointFolder``).

    Raises:
        OSError: the disk is full or failing.
    """
    with path.open("wb") as handle:
        writer = _Hashing(handle)
        try:
            torch.save(state, writer)
        except RuntimeError as error:  # torch reports a short archive where the disk's error would say why
            raise writer.error or error from None
        handle.write(FOOTER % writer.digest.hexdigest().encode())
        handle.flush()
        os.fsync(handle.fileno())


def read_state(path: Path) -> dict[str, Any]:
    """Return what ``write_state`` wrote, on the CPU, without executing pickled code.

    Raises:
        DamagedCheckpointError: a byte is missing or differs, the disk cannot read it, or it is another kind of file.
        FileNotFoundError: no such file.
    """
    try:
        problem = _damage(path)
        state = None if problem else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the disk, or a file of another version of torch
        problem = str(error)
    if problem:
        raise DamagedCheckpointError(f"{path}: damaged, or not a checkpoint of this trainer ({problem})")
    return state


def restore(
    path: Path, state: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> None:
    """Bring ``state``, read from ``path``, into a run's parts.

    Raises:
        ValueError: it belongs to another architecture.
    """
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: belongs to another model or optimizer; choose another --output_dir or --resume false ({error})"
        ) from error
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])


@contextmanager
def full_disk_is_said(path: Path, kept: str) -> Iterator[None]:
    """Turn whatever a full disk or quota raises while ``path`` is written into one line with sizes.

    Args:
        path: what is being written.
        kept: what stands instead, such as "the checkpoint of step 8 stands".

    Raises:
        OSError: ENOSPC, to which every command adds the remedy.
    """
    try:
        yield
    except Exception as error:
        # safetensors, which writes model folders, wraps the disk's error in one of its own
        if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and "os error 28" not in str(error):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        size = sum(file.stat().st_size for file in path.parent.glob("checkpoint*.pth")) / 1e6
        text = f"{path}: no space left to write it ({free:.1f} MB free; this run's checkpoints take {size:.1f} MB)"
        raise OSError(errno.ENOSPC, f"{text}; {kept}") from error


def _damage(path: Path) -> str:
    """Return why ``path`` is not whole, or nothing."""
    size = path.stat().st_size
    if size <= FOOTER_BYTES:
        return f"{size} bytes"
    digest, left = hashlib.sha256(), size - FOOTER_BYTES
    with path.open("rb") as handle:
        while left:
            block = handle.read(min(BLOCK, left))
            if not block:
                return "it ends early"
            digest.update(block)
            left -= len(block)
        footer = handle.read()
    if footer == FOOTER % digest.hexdigest().encode():
        return ""
    whole = footer.startswith(FOOTER[:20])
    return "its bytes are not those of its digest" if whole else "it does not end with a digest: cut short"


class _Hashing:
    """A file that hashes what is written to it, and remembers an error that its caller would replace."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle, self.digest = handle, hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, block: bytes) -> int:
        self.digest.update(block)
        try:
            return self.handle.write(block)
        except BaseException as error:  # KeyboardInterrupt too
            self.error = error
            raise

    def flush(self) -> None:
        self.handle.flush()
