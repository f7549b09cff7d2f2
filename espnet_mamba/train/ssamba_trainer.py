"""The step trainer for SSAMBA: its model folders, the names of its losses, and the published halving of the rate."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.torch_utils.device_funcs import to_device
from espnet2.train.distributed_utils import DistributedOption
from espnet2.utils.build_dataclass import build_dataclass

from espnet_mamba.models.ssamba.checkpoints import save_checkpoint
from espnet_mamba.train.meters import LossMeter, StepLog
from espnet_mamba.train.ssamba_model import ESPnetSsambaModel
from espnet_mamba.train.trainer import BEST, LAST, StepTrainer, StepTrainerOptions, _Run

SHOWN = {"loss_masked": "loss_info_nce", "feature_penalty": "loss_mse"}  # the meter's names -> what they are here


@dataclasses.dataclass
class SsambaTrainerOptions(StepTrainerOptions):
    """The step trainer's options and SSAMBA's."""

    plateau_patience: int
    plateau_factor: float


class SsambaTrainer(StepTrainer):
    """Trains ``ESPnetSsambaModel`` to ``max_steps`` updates; validates every ``num_iters_per_epoch``."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options that the step trainer lacks."""
        super().add_arguments(parser)
        parser.add_argument("--plateau_patience", type=int, default=2, help="validations without a better accuracy")
        parser.add_argument("--plateau_factor", type=float, default=0.5, help="of the rate after more than that many")

    @classmethod
    def build_options(cls, args: argparse.Namespace) -> SsambaTrainerOptions:
        """Pick the trainer's options from the command line's."""
        return build_dataclass(SsambaTrainerOptions, args)

    @classmethod
    def run(
        cls,
        model: ESPnetSsambaModel,
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        train_iter_factory: AbsIterFactory,
        valid_iter_factory: AbsIterFactory,
        plot_attention_iter_factory: AbsIterFactory | None,
        trainer_options: SsambaTrainerOptions,
        distributed_option: DistributedOption,
    ) -> None:
        """Train from the newest checkpoint, if there is one and ``--resume`` is given, to the last step."""
        run = _SsambaRun(model, optimizers[0], schedulers[0], trainer_options, distributed_option)
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


class _SsambaRun(_Run):
    """One training run of SSAMBA."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log = _NamedLog(self.log)

    @torch.no_grad()
    def validate(self, batches: Any, step: int) -> None:
        """Score the validation set, always with the same masks; keep the model of the lowest validation loss."""
        self.model.eval()
        meter = LossMeter()
        generator = torch.Generator(device=self.device).manual_seed(self.options.seed)
        for _, batch in batches:
            batch = to_device(batch, self.device)
            meter.add(self.model.sums(**batch, generator=generator), int(batch["num_samples"].sum()))
        row = meter.row(self.distributed, self.device, self.model.feature_penalty_weight)
        self.log.write("valid", step, row)
        if self.scheduler is not None:
            watch_plateau(
                self.scheduler, row["accuracy_masked"], self.options.plateau_patience, self.options.plateau_factor
            )
        if self.rank == 0 and row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            save_checkpoint(self.model.model.encoder, self.output_dir / BEST)

    def finish(self) -> None:
        """Write the last model as a folder."""
        if self.rank == 0:
            save_checkpoint(self.model.model.encoder, self.output_dir / LAST)
            logging.info(f"done: best validation loss {self.best_loss:.4f}; models {BEST}, {LAST} in {self.output_dir}")
        self.log.close()


def watch_plateau(scheduler: Any, accuracy: float, patience: int, factor: float) -> None:
    """Multiply the schedule's rates by ``factor`` when more than ``patience`` validations in a row were no better.

    What must be remembered is kept on the schedule, whose state is part of every checkpoint.
    """
    if accuracy > getattr(scheduler, "best_accuracy", float("-inf")):
        scheduler.best_accuracy, scheduler.validations_without_gain = accuracy, 0
        return
    scheduler.validations_without_gain += 1
    if scheduler.validations_without_gain > patience:
        scheduler.validations_without_gain = 0
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        logging.info(f"masked accuracy has not risen for {patience + 1} validations: learning rate times {factor:g}")


class _NamedLog:
    """A step log whose rows bear the names of this objective's parts."""

    def __init__(self, log: StepLog) -> None:
        self.log = log
        self.rewind, self.close = log.rewind, log.close

    def write(self, split: str, step: int, row: dict[str, float]) -> None:
        """Write one row of means for ``split``; nothing is predicted at seen patches, so no accuracy there."""
        named = {SHOWN.get(key, key): value for key, value in row.items() if key != "accuracy_unmasked"}
        self.log.write(split, step, named | {"loss_masked": row["loss_masked"]})  # what reports plot of any objective
