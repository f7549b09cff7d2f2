"""What training prints: sums over steps, averaged over processes, as log lines, JSON lines and tensorboard scalars."""

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


class LossMeter:
    """Adds up batches; ``row`` gives the means."""

    def __init__(self) -> None:
        self.totals = torch.zeros(7, dtype=torch.float64)
        self.seconds = 0.0

    def add(self, sums: PretrainingLoss, num_samples: int) -> None:
        """Add a batch of ``num_samples`` samples of audio."""
        values = [
            sums.loss_sum,
            sums.num_masked,
            sums.feature_penalty * sums.num_masked,
            sums.correct_masked,
            sums.correct_unmasked,
            sums.num_unmasked,
        ]
        batch = torch.stack([value.detach().double() for value in values]).cpu()
        self.totals += torch.cat([batch, torch.tensor([num_samples], dtype=torch.float64)])

    def reduced(self, distributed: bool, device: str) -> torch.Tensor:
        """Return the totals summed over all processes; a collective call when ``distributed``."""
        if not distributed:
            return self.totals
        totals = self.totals.to(device)
        torch.distributed.all_reduce(totals)
        return totals.cpu()

    def row(self, distributed: bool, device: str, feature_penalty_weight: float) -> dict[str, float]:
        """Return means per masked frame over all processes, and hours of audio per hour of work."""
        loss, masked, penalty, right, right_seen, seen, samples = self.reduced(distributed, device).tolist()
        masked, seen = max(masked, 1.0), max(seen, 1.0)
        row = {
            "loss": loss / masked + feature_penalty_weight * penalty / masked,
            "loss_masked": loss / masked,
            "feature_penalty": penalty / masked,
            "accuracy_masked": right / masked,
            "accuracy_unmasked": right_seen / seen,
        }
        if self.seconds:
            row |= {"seconds": self.seconds, "audio_rate": samples / 16000 / self.seconds}
        return row


class StepLog:
    """Writes a line per interval to the log, to ``train_log.jsonl`` and, if asked, to tensorboard."""

    def __init__(self, output_dir: Path, max_steps: int, active: bool, use_tensorboard: bool) -> None:
        self.path, self.max_steps, self.active = output_dir / LOG_NAME, max_steps, active
        self._clock: tuple[int, float] | None = None
        self._writers: dict[str, Any] = {}
        if active and use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writers = {k: SummaryWriter(str(output_dir / "tensorboard" / k)) for k in ("train", "valid")}
        if active:
            output_dir.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(output_dir / "train.log", encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
            logging.getLogger().addHandler(handler)

    def write(self, split: str, step: int, row: dict[str, float]) -> None:
        """Write one row of means for ``split``."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "split": split} | row) + "\n")
        for key, value in row.items():
            if self._writers:
                self._writers[split].add_scalar(key, value, step)
        numbers = " ".join(f"{key}={value:.4g}" for key, value in row.items())
        logging.info(f"{split} step={step}/{self.max_steps} {numbers}{self._eta(split, step)}")

    def _eta(self, split: str, step: int) -> str:
        if split != "train":
            return ""
        now = time.perf_counter()
        if self._clock is None:
            self._clock = (step, now)
            return ""
        first, started = self._clock
        left = (now - started) / (step - first) * (self.max_steps - step)
        return f" ETA={timedelta(seconds=round(left))}"

    def close(self) -> None:
        """Close tensorboard's files."""
        for writer in self._writers.values():
            writer.close()
