"""ESPnet's Trainer with steps as the unit: checkpoints and resumes by step, and every step's randomness is its own.

ESPnet 202511 saves at epoch ends only, in place, without random state; it has no ``max_steps`` and scales bf16
gradients with a GradScaler that overflows in HuBERT training. Hence ``run`` and the epoch are written anew here.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from espnet2.iterators.abs_iter_factory import AbsIterFactory
from espnet2.train.distributed_utils import DistributedOption
from espnet2.train.trainer import Trainer, TrainerOptions
from espnet2.utils.build_dataclass import build_dataclass
from espnet2.utils.types import float_or_none, str2bool
from torch import Tensor

from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.train.device_batches import num_samples_of, to_device
from espnet_mamba.train.espnet_model import ESPnetHubertModel
from espnet_mamba.train.iterators import StepIterFactory
from espnet_mamba.train.kept_run import BEST, KeptRun
from espnet_mamba.train.meters import LossMeter
from espnet_mamba.train.mfu import peak_flops, step_flops
from espnet_mamba.train.module_options import apply_module_options
from espnet_mamba.train.signals import RunInterrupted
from espnet_mamba.train.worst_batches import try_worst_batches


@dataclasses.dataclass
class StepTrainerOptions(TrainerOptions):
    """ESPnet's trainer options and ours."""

    max_steps: int
    save_interval_steps: int
    keep_interval_steps: int
    max_nonfinite_steps: int
    activation_checkpointing: bool
    compile: bool
    worst_batches_first: bool | None
    peak_tflops: float | None
    batch_type: str
    batch_bins: int
    max_crop_samples: int
    train_shape_file: Sequence[str]


class TrainingRun(KeptRun):
    """One training run: the model and all that changes with it.

    Another objective's model has ``model``, ``config``, ``sums``, ``loss`` and ``feature_penalty_weight`` like
    HuBERT's, and a run class that says how its encoder is saved.
    """

    def __init__(
        self,
        model: ESPnetHubertModel,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        options: StepTrainerOptions,
        distributed: DistributedOption,
    ) -> None:
        super().__init__(model, optimizer, scheduler, options, distributed)
        self.sums = model.sums
        self.peak = peak_flops(self.device, options.use_amp, options.peak_tflops)
        if self.distributed:
            # DDP synchronises gradients for calls through itself only, so it wraps the part that is called
            self.sums = torch.nn.parallel.DistributedDataParallel(model.model, find_unused_parameters=True)

    def train_steps(self, batches: Any, step: int, last: int, interval: int) -> None:
        """Make the updates ``step + 1 .. last``; log each ``interval``."""
        self.model.train()
        while step < last:
            started = time.perf_counter()
            parts = [next(batches) for _ in range(self.options.accum_grad)]
            waited = time.perf_counter() - started
            step += 1
            self._begin_step()
            grad_norm = self._update(step, [batch for _, batch in parts])
            if math.isfinite(grad_norm):
                self.guard.good_step()
            else:
                self._count_bad_step(step, parts)
            self.meter.waited += waited
            self.meter.seconds += time.perf_counter() - started
            if step % interval == 0 or step == last:
                self._log_line(step, grad_norm)
            self._end_step(step, last)

    def _log_line(self, step: int, grad_norm: float) -> None:
        """Write the means since the last line, and begin anew."""
        row = self.meter.row(self.distributed, self.device, self.model.feature_penalty_weight, self.peak)
        self.hours_seen += row.pop("hours")
        row |= {"grad_norm": grad_norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if not math.isnan(self.hours_seen):
            row["hours_seen"] = self.hours_seen
        self.log.write("train", step, row)
        self.meter = LossMeter()

    def _update(self, step: int, batches: list[dict[str, Tensor]]) -> float:
        """Make one update unless its gradient is not finite; return the gradient's norm before clipping.

        To read that norm is one wait for the device per update. Another is inside each batch's forward pass
        (``models.pretraining``); there are no others, whatever the number of utterances.
        """
        self.optimizer.zero_grad(set_to_none=True)
        masked = torch.zeros((), device=self.device)
        for part, batch in enumerate(batches):
            self._seed(step, part)
            batch = to_device(batch, self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.options.use_amp):
                sums = self.sums(**batch)
            (self.model.loss(sums) * sums.num_masked).backward()
            masked += sums.num_masked
            lengths = num_samples_of(batch)
            self.meter.add(sums, batch["speech"].numel(), step_flops(self.model.config, lengths) if self.peak else 0.0)
        self._divide_gradients(masked)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.options.grad_clip, self.options.grad_clip_type
        )
        grad_norm = float(norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return grad_norm

    def _divide_gradients(self, masked: Tensor) -> None:
        """Make the gradients of sums those of the mean over the masked frames of all parts of all processes.

        So a step's gradient does not depend on how its batches are spread over processes and parts.
        """
        if self.distributed:
            torch.distributed.all_reduce(masked)
            masked /= self.world  # as DDP has done with the gradients
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        torch._foreach_div_(gradients, masked.clamp(min=1))

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
            if not self.distributed:  # processes need not have the same number of batches to agree over
                self.stop.check()
        row = meter.row(self.distributed, self.device, self.model.feature_penalty_weight)
        self.log.write("valid", step, row)
        if self.rank == 0 and row["loss"] < self.best_loss:
            self.best_loss = row["loss"]
            self._write_model(BEST)
        self.validated = True
        return row

    def save_model(self, folder: Path) -> None:
        """Write the encoder, without what only pretraining needs, as a model folder."""
        save_checkpoint(self.model.model.hubert, folder)


class StepTrainer(Trainer):
    """Trains ``ESPnetHubertModel`` to ``max_steps`` updates; validates every ``num_iters_per_epoch``."""

    run_class = TrainingRun  # what another objective replaces

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options that ESPnet's Trainer lacks."""
        parser.add_argument("--max_steps", type=int, default=250_000, help="updates of the whole run, not --max_epoch")
        parser.add_argument("--save_interval_steps", type=int, default=500, help="updates between checkpoints")
        parser.add_argument(
            "--keep_interval_steps",
            type=int,
            default=0,
            help="updates between models that stay, as folders step_N, the untrained step_0 among them; 0: none",
        )
        parser.add_argument(
            "--max_nonfinite_steps",
            type=int,
            default=10,
            help="steps in a row with a gradient not finite to stop at",
        )
        parser.add_argument(
            "--activation_checkpointing",
            type=str2bool,
            default=False,
            help="compute each block's activations twice instead of keeping them: less memory, more time",
        )
        parser.add_argument(
            "--compile", type=str2bool, default=False, help="torch.compile the front end and the blocks, not scans"
        )
        parser.add_argument(
            "--worst_batches_first",
            type=str2bool,
            default=None,
            help="before a run's first step, try the largest batches and print their memory; default: on GPUs only",
        )
        parser.add_argument(
            "--peak_tflops", type=float_or_none, default=None, help="of one device, for MFU; default: of listed GPUs"
        )
        parser.set_defaults(exclude_weight_decay=True)  # of A_log, D, norms, biases: see train/optimizers.py

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
        train_iter_factory: StepIterFactory,
        valid_iter_factory: StepIterFactory,
        plot_attention_iter_factory: AbsIterFactory | None,
        trainer_options: StepTrainerOptions,
        distributed_option: DistributedOption,
    ) -> None:
        """Train from the newest checkpoint, if there is one and ``--resume`` is given, to the last step.

        SIGTERM or SIGUSR1 ends it after the step under way, saved, without an error and without the model ``last``.
        """
        apply_module_options(model.model, trainer_options.activation_checkpointing, trainer_options.compile)
        run = cls.run_class(model, optimizers[0], schedulers[0], trainer_options, distributed_option)
        with closing(train_iter_factory), closing(valid_iter_factory), run.stop.listening():
            try:
                cls._run_steps(run, train_iter_factory, valid_iter_factory)
            except RunInterrupted as reason:
                run.leave(reason)
                return
            except RuntimeError as error:
                if told := train_iter_factory.told_of_worker(error):
                    raise RuntimeError(told) from error
                raise
        run.finish()

    @staticmethod
    def _run_steps(run: TrainingRun, train_iter_factory: StepIterFactory, valid_iter_factory: StepIterFactory) -> None:
        options, iterations = run.options, train_iter_factory.iters_per_epoch
        run.batches_per_iter = getattr(train_iter_factory, "batches_per_iter", 1)
        step = run.resume()
        run.log.start(step, run.validated)
        run.keep_model(step)  # again where a kill came between checkpoint and model
        if iterations < options.accum_grad:
            raise ValueError(f"an epoch has {iterations} batches, fewer than one update takes: lower --accum_grad")
        if step >= options.max_steps:
            logging.info(f"training has already reached step {step} of {options.max_steps}")
        wanted = options.ngpu > 0 if options.worst_batches_first is None else options.worst_batches_first
        if wanted and step == 0 < options.max_steps:
            try_worst_batches(run, train_iter_factory)
        while step < options.max_steps or not run.validated:
            if run.validated:
                done = run.used // run.batches_per_iter  # another number of processes may have used them
                if iterations - done < options.accum_grad:
                    run.epoch, run.used, done = run.epoch + 1, 0, 0
                batches = train_iter_factory.build_iter(run.epoch, skip=done)
                last = min(step + (iterations - done) // options.accum_grad, options.max_steps)
                interval = options.log_interval or max(1, iterations // options.accum_grad // 5)
                run.train_steps(batches, step, last, interval)
                step = last
            run.validate(valid_iter_factory.build_iter(run.epoch), step)
            run.save(step)
            run.stop.check()
