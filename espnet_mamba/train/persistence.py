"""A run's checkpoints on disk: the last two, each whole or not there, and which of them a run goes on from."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from espnet_mamba.data.files import write_text
from espnet_mamba.train.checkpoint import DamagedCheckpointError, full_disk_is_said, read_state, write_state

CHECKPOINT, PREVIOUS = "checkpoint.pth", "checkpoint.previous.pth"
DAMAGED, OLD = "checkpoint.damaged.pth", "checkpoint.old.pth"
WRITING = ".checkpoint.writing"  # one name for every attempt, so that killed ones do not pile up


class CheckpointFolder:
    """The checkpoints of a run; every process of the run has one, the first (rank 0) writes."""

    def __init__(self, folder: Path, rank: int, distributed: bool) -> None:
        self.folder, self.rank, self.distributed = folder, rank, distributed
        self.path, self.previous = folder / CHECKPOINT, folder / PREVIOUS
        self.step = 0  # of the newest checkpoint

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state``, which has a ``step``, as the newest checkpoint, and keep the one before it.

        Whenever this process is killed, one of the two names holds a whole checkpoint.

        Raises:
            OSError: the disk is full (the message has sizes; the older checkpoint stands) or failing.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / WRITING
        kept = f"the checkpoint of step {self.step} stands" if self.step else "there is no earlier checkpoint"
        try:
            with full_disk_is_said(self.path, kept):
                write_state(temporary, state)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if self.path.exists():
            os.replace(self.path, self.previous)
        os.replace(temporary, self.path)
        _sync_folder(self.folder)
        self.step = state["step"]

    def load(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest whole checkpoint and its path, the same in every process; None when there is none.

        One that is damaged is set aside under another name, with a warning that names it and the one used instead.

        Raises:
            ValueError: there are checkpoints, and none is whole.
        """
        found, error = None, None
        if self.rank == 0:
            try:
                found = self._newest_whole()
            except (OSError, ValueError) as caught:
                error = caught
        if self.distributed:  # the first process chooses, since a network disk may show others an older state
            answer = [(found[0] if found else None, str(error) if error else None)]
            torch.distributed.broadcast_object_list(answer)
            path, text = answer[0]
            if self.rank:
                error = ValueError(text) if text else None
                found = (path, read_state(path)) if path else None
        if error:
            raise error
        if found:
            self.step = found[1]["step"]
        return found

    def _newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        problems = []
        for path in (self.path, self.previous):
            if not path.exists():
                continue
            try:
                state = read_state(path)
            except DamagedCheckpointError as error:
                problems.append(str(error))
                continue
            if problems:  # never again the newest, and above all never the previous: that one is good
                os.replace(self.path, self.folder / DAMAGED)
                logging.warning(
                    f"{problems[0]}; kept as {DAMAGED}; going on from the previous one, {path}, of step {state['step']}"
                )
            return path, state
        if problems:
            raise ValueError("; ".join(problems) + "; no whole checkpoint is left: delete it to start anew")
        return None

    def set_aside(self) -> None:
        """Rename what an earlier run left (``--resume false``): no fallback of this run may reach it."""
        if self.rank == 0:
            for path in (self.previous, self.path):  # the newest last: it is the one that stays
                if path.exists():
                    os.replace(path, self.folder / OLD)
                    logging.warning(
                        f"{path}: of an earlier run, not used (--resume false); the newest is kept as {OLD}"
                    )

    def sweep(self, *model_folders: str) -> None:
        """Delete what killed attempts left unfinished: a checkpoint, and folders of the models named."""
        if self.rank == 0 and self.folder.is_dir():
            (self.folder / WRITING).unlink(missing_ok=True)
            for name in model_folders:
                for folder in self.folder.glob(f".{name}.*"):
                    shutil.rmtree(folder, ignore_errors=True)


def drop_rows_beyond(path: Path, step: int, validated: bool = True) -> None:
    """Drop rows of a JSON-lines file that are beyond ``step``; a row that a kill cut short counts as such.

    Args:
        path: of the file; nothing is done where there is none.
        step: the last one to keep.
        validated: whether the validation after that step is to be kept too (``"split": "valid"``).
    """
    if not path.is_file():
        return
    kept = []
    for row in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(row)
            number, split = int(value["step"]), value.get("split")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if number < step or number == step and (validated or split != "valid"):
            kept.append(row + "\n")
    write_text(path, "".join(kept))


def sync_file(path: Path) -> None:
    """Bring a file that is appended to down to the disk, so that no later checkpoint is without its rows."""
    if path.is_file():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
