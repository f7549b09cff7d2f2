"""The step trainer for SSAMBA: its model folders, the names of its losses, and the published halving of the rate."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from espnet2.utils.build_dataclass import build_dataclass

from espnet_mamba.models.ssamba.checkpoints import save_checkpoint
from espnet_mamba.train.meters import StepLog
from espnet_mamba.train.trainer import StepTrainer, StepTrainerOptions, TrainingRun

SHOWN = {"loss_masked": "loss_info_nce", "feature_penalty": "loss_mse"}  # the meter's names -> what they are here


@dataclasses.dataclass
class SsambaTrainerOptions(StepTrainerOptions):
    """The step trainer's options and SSAMBA's."""

    plateau_patience: int
    plateau_factor: float


class SsambaRun(TrainingRun):
    """One training run of SSAMBA."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log = _NamedLog(self.log)

    def validate(self, batches: Any, step: int) -> dict[str, float]:
        """Score the validation set, keep the best model, and let the rate fall when the accuracy has stopped rising."""
        row = super().validate(batches, step)
        if self.scheduler is not None:
            watch_plateau(
                self.scheduler, row["accuracy_masked"], self.options.plateau_patience, self.options.plateau_factor
            )
        return row

    def save_model(self, folder: Path) -> None:
        """Write the encoder as a model folder of its own format."""
        save_checkpoint(self.model.model.encoder, folder)


class SsambaTrainer(StepTrainer):
    """Trains ``ESPnetSsambaModel`` to ``max_steps`` updates; validates every ``num_iters_per_epoch``."""

    run_class = SsambaRun

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
        self.start, self.close = log.start, log.close

    def write(self, split: str, step: int, row: dict[str, float]) -> None:
        """Write one row of means for ``split``; nothing is predicted at seen patches, so no accuracy there."""
        named = {SHOWN.get(key, key): value for key, value in row.items() if key != "accuracy_unmasked"}
        self.log.write(split, step, named | {"loss_masked": row["loss_masked"]})  # what reports plot of any objective
