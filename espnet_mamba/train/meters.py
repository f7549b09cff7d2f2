"""What training prints: sums over steps and processes, as log lines, JSON lines and tensorboard scalars."""

from __future__ import annotations

import json
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from espnet_mamba.models.pretraining import PretrainingLoss

LOG_NAME = "train_log.jsonl"
SAMPLE_RATE = 16000


class LossMeter:
    """Adds up batches; ``row`` gives the means.

    The sums of losses stay on the device until a row or a checkpoint wants them: to read them at each step would make
    the host wait. What the host knows by itself, times and FLOPs, is of this process's own steps alone.
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(7, dtype=torch.float64)  # what a checkpoint holds of a line that is not yet full
        self.seconds = 0.0  # of work
        self.waited = 0.0  # of these, for data
        self.samples = 0  # of audio in that time
        self.flops = 0.0

    def add(self, sums: PretrainingLoss, num_samples: int, flops: float = 0.0) -> None:
        """Add a batch of ``num_samples`` samples of audio, whose step takes ``flops``."""
        values = [
            sums.loss_sum,
            sums.num_masked,
            sums.feature_penalty * sums.num_masked,
            sums.correct_masked,
            sums.correct_unmasked,
            sums.num_unmasked,
        ]
        batch = torch.stack([value.detach().double() for value in values] + [_known(num_samples, sums.loss_sum)])
        self.totals = self.totals.to(batch.device, non_blocking=True) + batch
        self.samples += num_samples
        self.flops += flops

    def reduced(self, distributed: bool, device: str) -> torch.Tensor:
        """Return the totals summed over all processes, on the CPU; a collective call when ``distributed``."""
        if not distributed:
            return self.totals.cpu()
        totals = self.totals.to(device, copy=True)
        torch.distributed.all_reduce(totals)
        return totals.cpu()

    def row(
        self, distributed: bool, device: str, feature_penalty_weight: float, peak: float | None = None
    ) -> dict[str, float]:
        """Return means per masked frame over all processes; a collective call when ``distributed``.

        Args:
            distributed: whether there are other processes.
            device: of the sums over processes.
            feature_penalty_weight: of the penalty in the loss.
            peak: FLOP/s of one device; None: not known, and no ``mfu`` is given.

        Returns:
            Loss parts and accuracies. Where time was measured: ``seconds`` of it, ``audio_rate`` in seconds of audio
            per second, ``data_wait`` and ``mfu`` as shares, and ``hours`` of audio.
        """
        loss, masked, penalty, right, right_seen, seen, samples = self.reduced(distributed, device).tolist()
        masked, seen = max(masked, 1.0), max(seen, 1.0)
        row = {
            "loss": loss / masked + feature_penalty_weight * penalty / masked,
            "loss_masked": loss / masked,
            "feature_penalty": penalty / masked,
            "accuracy_masked": right / masked,
            "accuracy_unmasked": right_seen / seen,
        }
        if not self.seconds:
            return row
        work = torch.tensor([1.0, self.seconds, self.waited, self.samples, self.flops], dtype=torch.float64)
        if distributed:
            work = work.to(device)
            torch.distributed.all_reduce(work)
        processes, seconds, waited, rated, flops = work.tolist()
        row |= {"seconds": seconds / processes, "audio_rate": rated / SAMPLE_RATE / (seconds / processes)}
        row["data_wait"] = waited / seconds
        if peak:
            row["mfu"] = flops / (seconds * peak)
        return row | {"hours": samples / SAMPLE_RATE / 3600}


def _known(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.full((), value, dtype=torch.float64, device=like.device)


class StepLog:
    """Writes a line per interval to the log, to ``train_log.jsonl`` and, if asked, to tensorboard."""

    def __init__(self, output_dir: Path, max_steps: int, active: bool, use_tensorboard: bool) -> None:
        self.path, self.max_steps, self.active = output_dir / LOG_NAME, max_steps, active
        self._start = (0, time.perf_counter())
        self._writers: dict[str, Any] = {}
        self._folder = output_dir / "tensorboard" if active and use_tensorboard else None
        if active:
            output_dir.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(output_dir / "train.log", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
            logging.getLogger().addHandler(handler)

    def start(self, step: int, validated: bool = True) -> None:
        """Begin behind ``step``, or go on from it: the time to the end is reckoned from here.

        Tensorboard forgets what a killed run wrote beyond it (``purge_step``), so that curves do not overlap.

        Args:
            step: of the checkpoint, 0 for none.
            validated: whether the validation after that step stands.
        """
        self._start = (step, time.perf_counter())
        if self._folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            for split, first in (("train", step + 1), ("valid", step + 1 if validated else step)):
                self._writers[split] = SummaryWriter(str(self._folder / split), purge_step=first)

    def write(self, split: str, step: int, row: dict[str, float]) -> None:
        """Write one row of means for ``split``."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "split": split} | row) + "\n")
        if self._writers:
            for key, value in row.items():
                self._writers[split].add_scalar(key, value, step)
        numbers = " ".join(f"{key}={value:.4g}" for key, value in row.items())
        logging.info(f"{split} step={step}/{self.max_steps} {numbers}{self._eta(split, step)}")

    def _eta(self, split: str, step: int) -> str:
        first, started = self._start
        if split != "train" or step == first:
            return ""
        left = (time.perf_counter() - started) / (step - first) * (self.max_steps - step)
        return f" ETA={timedelta(seconds=round(left))}"

    def close(self) -> None:
        """Close tensorboard's files."""
        for writer in self._writers.values():
            writer.close()
