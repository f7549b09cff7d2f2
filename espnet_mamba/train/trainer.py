"""ESPnet's Trainer with steps as the unit: checkpoints and resumes by step, and every step's randomness is its own.

ESPnet 202511 saves at epoch ends only, in place, without random state; it has no ``max_steps`` and scales bf16
gradients with a GradScaler that overflows in HuBERT training. Hence ``run`` and the epoch are written anew here.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.trainer import Trainer, TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass
from torch import Tensor

from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.train.checkpoint import load_training_state, save_training_state
from espnet_mamba.train.espnet_model import ESPnetHubertModel
from espnet_mamba.train.meters import LossMeter, StepLog

CHECKPOINT = "checkpoint.pth"
BEST, LAST = "valid.loss.best", "last"  # model folders
MAX_BAD_STEPS = 10


@dataclasses.dataclass
class StepTrainerOptions(TrainerOptions):
    """ESPnet's trainer options and ours."""

    max_steps: int
    save_interval_steps: int


class TrainingRun:
    """One training run: the model and all that changes with it.

    Another objective's model has ``model``, ``sums``, ``loss`` and ``feature_penalty_weight`` like HuBERT's, and a run
    class that says how its encoder is saved.
    """

    def __init__(
        self,
        model: ESPnetHubertModel,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: StepTrainerOptions,
        distributed: DistributedOption,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.options, self.output_dir = options, Path(options.output_dir)
        self.device = "cuda" if options.ngpu > 0 else "cpu"
        self.distributed = distributed.distributed
        self.rank, self.world = distributed.dist_rank or 0, distributed.dist_world_size or 1
        self.sums = model.sums
        if self.distributed:
            # DDP synchronises gradients for calls through itself only, so it wraps the part that is called
            self.sums = torch.nn.parallel.DistributedDataParallel(model.model, find_unused_parameters=True)
        self.best_loss, self.bad_steps = float("inf"), 0
        self.meter = LossMeter()
        self.log = StepLog(self.output_dir, options.max_steps, self.rank == 0, options.use_tensorboard)

    def resume(self) -> int:
        """Load the checkpoint if there is one; return the number of updates it holds."""
        path = self.output_dir / CHECKPOINT
        if not path.is_file():
            return 0
        step, self.best_loss, totals = load_training_state(path, self.model, self.optimizer, self.scheduler)
        if self.rank == 0:  # it holds the sum over all ranks
            self.meter.totals = totals
        self.log.rewind(step)
        logging.info(f"resumed from {path} at step {step}")
        return step

    def train_steps(self, batches: Any, step: int, last: int, interval: int) -> None:
        """Make the updates ``step + 1 .. last``; log each ``interval``."""
        self.model.train()
        while step < last:
            started = time.perf_counter()
            parts = [next(batches) for _ in range(self.options.accum_grad)]
            step += 1
            grad_norm = self._update(step, [batch for _, batch in parts])
            if not torch.isfinite(grad_norm):
                self._count_bad_step(step, [utt_id for utt_ids, _ in parts for utt_id in utt_ids])
            else:
                self.bad_steps = 0
            self.meter.seconds += time.perf_counter() - started
            if step % interval == 0 or step == last:
                row = self.meter.row(self.distributed, self.device, self.model.feature_penalty_weight)
                row |= {"grad_norm": float(grad_norm), "learning_rate": self.optimizer.param_groups[0]["lr"]}
                self.log.write("train", step, row)
                self.meter = LossMeter()
            if step % self.options.save_interval_steps == 0 and step != last:
                self.save(step)

    def _update(self, step: int, batches: list[dict[str, Tensor]]) -> Tensor:
        # Dropout, layer drop and masks draw from (seed, step, rank) alone: a resumed run repeats them without saving
        # any random state, and no draw of another part of the program can shift them.
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 4096 + self.rank)
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            batch = to_device(batch, self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.options.use_amp):
                sums = self.sums(**batch)
            loss = self.model.loss(sums, self._global_masked(sums.num_masked)) / len(batches)
            loss.backward()
            self.meter.add(sums, batch["speech"].numel())
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.options.grad_clip, self.options.grad_clip_type
        )
        if torch.isfinite(grad_norm):
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return grad_norm

    def _global_masked(self, num_masked: Tensor) -> Tensor:
        """Return the divisor that makes DDP's average of gradients the mean over all masked frames of all ranks."""
        if not self.distributed:
            return num_masked
        total = num_masked.clone()
        torch.distributed.all_reduce(total)
        return total / self.world

    def _count_bad_step(self, step: int, utt_ids: list[str]) -> None:
        self.bad_steps += 1
        logging.warning(f"step {step}: gradient norm is not finite; update skipped; batch: {' '.join(utt_ids)}")
        if self.bad_steps >= MAX_BAD_STEPS:
            raise ValueError(
                f"{MAX_BAD_STEPS} steps in a row had gradients that are not finite, the last at step {step}; "
                "lower optim_conf.lr or look at the utterances named above"
            )

    @torch.no_grad()
    def validate(self, batches: Any, step: int) -> dict[str, float]:
        """Score the validation set without dropout, always with the same masks; keep the best model.

        Returns:
            What was logged, under the meter's names.
        """
        self.model.eval()
        meter = LossMeter()
        generator = torch.Generator(device=self.device).manual_seed(self.options.seed)
        for _, batch in batches:
            batch = to_device(batch, self.device)
            meter.add(self.model.sums(**batch, generator=generator), int(batch["num_samples"].sum()))
        row = meter.row(self.distributed, self.device, self.model.feature_penalty_weight)
        self.log.write("valid", step, row)
        if self.rank == 0 and row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            self.save_model(self.output_dir / BEST)
        return row

    def save_model(self, folder: Path) -> None:
        """Write the encoder, without what only pretraining needs, as a model folder."""
        save_checkpoint(self.model.model.hubert, folder)

    def save(self, step: int) -> None:
        """Write the training state of ``step``, atomically, with the sums of a log line that is not yet full."""
        totals = self.meter.reduced(self.distributed, self.device)
        if self.rank == 0:
            path = self.output_dir / CHECKPOINT
            save_training_state(path, self.model, self.optimizer, self.scheduler, step, self.best_loss, totals)

    def finish(self) -> None:
        """Write the last model as a folder."""
        if self.rank == 0:
            self.save_model(self.output_dir / LAST)
            logging.info(f"done: best validation loss {self.best_loss:.4f}; models {BEST}, {LAST} in {self.output_dir}")
        self.log.close()


class StepTrainer(Trainer):
    """Trains ``ESPnetHubertModel`` to ``max_steps`` updates; validates every ``num_iters_per_epoch``."""

    run_class = TrainingRun  # what another objective replaces

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options that ESPnet's Trainer lacks."""
        parser.add_argument("--max_steps", type=int, default=250_000, help="updates of the whole run, not --max_epoch")
        parser.add_argument("--save_interval_steps", type=int, default=500, help="updates between checkpoints")

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> StepTrainerOptions:
        """Pick the trainer's options from the command line's."""
        return build_dataclass(StepTrainerOptions, args)

    @classmethod
    def run(
        cls,
        model: ESPnetHubertModel,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        train_iter_factory: AbsIterFactory,
        valid_iter_factory: AbsIterFactory,
        plot_attention_iter_factory: AbsIterFactory | None,
        trainer_options: StepTrainerOptions,
        distributed_option: DistributedOption,
    ) -> None:
        """Train from the newest checkpoint, if there is one and ``--resume`` is given, to the last step."""
        run = cls.run_class(model, optimizers[0], schedulers[0], trainer_options, distributed_option)
        step = run.resume() if trainer_options.resume else 0
        updates_per_epoch = max(1, train_iter_factory.iters_per_epoch // trainer_options.accum_grad)
        if step >= trainer_options.max_steps:
            logging.info(f"training has already reached step {step} of {trainer_options.max_steps}")
        while step < trainer_options.max_steps:
            epoch, done = step // updates_per_epoch + 1, step % updates_per_epoch
            batches = train_iter_factory.build_iter(epoch, skip=done * trainer_options.accum_grad)
            last = min(epoch * updates_per_epoch, trainer_options.max_steps)
            run.train_steps(batches, step, last, trainer_options.log_interval or max(1, updates_per_epoch // 5))
            step = last
            run.validate(valid_iter_factory.build_iter(epoch), step)
            run.save(step)
        run.finish()
