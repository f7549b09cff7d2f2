"""The state of a training run on disk: tensors and plain values only, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from espnet_mamba.data.files import atomic_path


def save_training_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    step: int,
    best_loss: float,
    totals: torch.Tensor,
) -> None:
    """Write weights, optimiser, schedule, step, best validation loss and the log's sums, synced and renamed."""
    state = {
        "step": step,
        "best_loss": best_loss,
        "totals": totals,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
    }
    with atomic_path(path) as temporary:
        torch.save(state, temporary)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_training_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[int, float, torch.Tensor]:
    """Load what ``save_training_state`` wrote, without executing pickled code; return step, best loss and totals.

    Raises:
        ValueError: not such a file, or it belongs to another architecture.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        step, best_loss, totals = state["step"], state["best_loss"], state["totals"]
    except Exception as error:  # a torn file can fail anywhere in the unpickler, with any error
        raise ValueError(f"{path}: not a checkpoint of this trainer ({error}); delete it to start anew") from error
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path}: belongs to another model or optimizer; choose another --output_dir or --resume false ({error})"
        ) from error
    if scheduler is not None and state["scheduler"] is not None:
        scheduler.load_state_dict(state["scheduler"])
    return step, best_loss, totals
