"""What a pretraining run must not lose: how it is saved, resumed and left; which batches and steps are behind it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.distributed_utils import DistributedOption
from torch import Tensor

from espnet_mamba.data.files import write_json
from espnet_mamba.train.checkpoint import full_disk_is_said, restore
from espnet_mamba.train.espnet_model import ESPnetHubertModel
from espnet_mamba.train.meters import LOG_NAME, LossMeter, StepLog
from espnet_mamba.train.nonfinite import NonFiniteGuard
from espnet_mamba.train.persistence import CheckpointFolder, drop_rows_beyond, sync_file
from espnet_mamba.train.signals import RunInterrupted, StopRequest

BEST, LAST = "valid.loss.best", "last"  # model folders
INTERRUPTED = "interrupted.json"  # there while a run that was asked to stop waits to be started again


class KeptRun:
    """The state of a run and its way to the disk and back; ``TrainingRun`` is what trains."""

    def __init__(
        self,
        model: ESPnetHubertModel,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: Any,
        distributed: DistributedOption,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.options, self.output_dir = options, Path(options.output_dir)
        self.device = "cuda" if options.ngpu > 0 else "cpu"
        self.distributed = distributed.distributed
        self.rank, self.world = distributed.dist_rank or 0, distributed.dist_world_size or 1
        self.step, self.best_loss, self.validated = 0, float("inf"), True
        self.epoch, self.used = 1, 0  # the epoch, and how many of its batches are behind all processes together
        self.hours_seen = 0.0  # of audio, by all processes, up to the last log line; NaN: an older checkpoint has none
        self.batches_per_iter = 1  # taken by all processes together: 1 where they share each, else their number
        self.checkpoints = CheckpointFolder(self.output_dir, self.rank, self.distributed)
        self.guard = NonFiniteGuard(model, self.output_dir, options.max_nonfinite_steps, self.rank, self.distributed)
        self.stop = StopRequest(self.distributed, self.device)
        self.meter = LossMeter()
        self.log = StepLog(self.output_dir, options.max_steps, self.rank == 0, options.use_tensorboard)

    def resume(self) -> int:
        """Load the newest whole checkpoint, if there is one and ``--resume``; return the number of updates it holds."""
        self.checkpoints.sweep(BEST, LAST)
        found = None
        if self.options.resume:
            found = self.checkpoints.load()
        else:
            self.checkpoints.set_aside()
        if found:
            path, state = found
            restore(path, state, self.model, self.optimizer, self.scheduler)
            self.step, self.best_loss, self.validated = state["step"], state["best_loss"], state["validated"]
            self.epoch, self.used, self.guard.in_a_row = state["epoch"], state["used"], state["bad_steps"]
            self.hours_seen = state.get("hours_seen", float("nan"))
            if self.rank == 0:  # it holds the sum over all ranks
                self.meter.totals = state["totals"]
            logging.info(f"resumed from {path} at step {self.step}")
        if self.rank == 0:  # rows that a killed run wrote after its checkpoint will be written again
            drop_rows_beyond(self.output_dir / LOG_NAME, self.step, self.validated)
            drop_rows_beyond(self.guard.path, self.step)
            (self.output_dir / INTERRUPTED).unlink(missing_ok=True)
        return self.step

    def _write_model(self, name: str) -> None:
        try:
            with full_disk_is_said(self.output_dir / name, f"the checkpoint of step {self.checkpoints.step} stands"):
                self.save_model(self.output_dir / name)
        finally:
            self.checkpoints.sweep(name)

    def save(self, step: int) -> None:
        """Write the training state of ``step``, atomically, with the sums of a log line that is not yet full."""
        totals = self.meter.reduced(self.distributed, self.device)
        if self.rank:
            self.checkpoints.step = step
            return
        state = {"step": step, "best_loss": self.best_loss, "validated": self.validated, "totals": totals}
        state |= {"epoch": self.epoch, "used": self.used, "bad_steps": self.guard.in_a_row}
        state |= {"hours_seen": self.hours_seen}
        state |= {"model": self.model.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict()}
        state |= {"scheduler": self.scheduler.state_dict() if self.scheduler is not None else None}
        for path in (self.output_dir / LOG_NAME, self.guard.path):
            sync_file(path)
        self.checkpoints.save(state)

    def save_model(self, folder: Path) -> None:
        """Write the encoder, without what only pretraining needs, as a model folder."""
        raise NotImplementedError

    def keep_model(self, step: int) -> None:
        """Write the model of a step as a folder that stays, where ``keep_interval_steps`` asks for one."""
        interval = self.options.keep_interval_steps
        if self.rank == 0 and interval and step % interval == 0:
            self._write_model(f"step_{step}")

    def finish(self) -> None:
        """Write the last model as a folder."""
        if self.rank == 0:
            self._write_model(LAST)
            logging.info(f"done: best validation loss {self.best_loss:.4f}; models {BEST}, {LAST} in {self.output_dir}")
        self.log.close()

    def leave(self, reason: RunInterrupted) -> None:
        """Save if the last step is not yet, and say what goes on from it; no model ``last`` is written."""
        if self.step != self.checkpoints.step:
            self.save(self.step)
        if self.rank == 0:
            write_json(self.output_dir / INTERRUPTED, {"step": self.step, "signal": str(reason)})
            logging.info(
                f"{reason}: ended at step {self.step} of {self.options.max_steps}, which is saved; "
                "the same command goes on from there"
            )
        self.log.close()

    def _seed(self, step: int, part: int) -> None:
        """Seed dropout, layer drop and masks of a batch by its number in the run: step, then part, then rank.

        So a resumed run repeats them without saving any random state, no draw of another part of the program can shift
        them, and two processes draw what one process with twice the parts does.
        """
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + part * self.world + self.rank)

    def _count_bad_step(self, step: int, parts: Sequence[tuple[list[str], dict[str, Tensor]]]) -> None:
        def repeat(part: int) -> Tensor:
            self._seed(step, part)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.options.use_amp):
                sums = self.model.sums(**to_device(parts[part][1], self.device))
            return self.model.loss(sums) * sums.num_masked

        self.meter.totals = self._totals  # a log line tells of the updates that were made
        self.guard.bad_step(step, [utt_ids for utt_ids, _ in parts], [batch for _, batch in parts], repeat)

    def _begin_step(self) -> None:
        """Remember what a step that will be skipped must not leave its mark on."""
        self._totals = self.meter.totals.clone()
        self.guard.before_step()

    def _end_step(self, step: int, last: int) -> None:
        """Save where it is due, before a validation among others; leave, saved, where the run is asked to stop."""
        self.step, self.validated = step, step != last
        self.used += self.options.accum_grad * self.batches_per_iter
        if step % self.options.save_interval_steps == 0 or step == last:
            self.save(step)
        self.keep_model(step)
        self.stop.check()
