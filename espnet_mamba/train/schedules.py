"""Learning-rate schedules that ESPnet does not have."""

from __future__ import annotations

import torch
from espnet2.schedulers.abs_scheduler import AbsBatchStepScheduler
from torch.optim.lr_scheduler import LRScheduler


class PolynomialWarmup(LRScheduler, AbsBatchStepScheduler):
    """Linear warm-up over the first ``warmup_ratio`` of ``total_steps``, then decay to 0 (docs/papers.md 5)."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        warmup_ratio: float = 0.08,
        total_steps: int = 400_000,
        power: float = 1.0,
        last_epoch: int = -1,
    ) -> None:
        if not 0 <= warmup_ratio < 1 or total_steps < 1:
            raise ValueError(f"polynomial_warmup: warmup_ratio {warmup_ratio} of {total_steps} steps; wanted: 0 to 1")
        self.warmup_steps, self.total_steps, self.power = round(warmup_ratio * total_steps), total_steps, power
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """Return the rate of each parameter group for the next update."""
        update = self.last_epoch + 1
        if update <= self.warmup_steps:
            factor = update / self.warmup_steps
        else:
            left = max(0.0, (self.total_steps - self.last_epoch) / (self.total_steps - self.warmup_steps))
            factor = left**self.power
        return [rate * factor for rate in self.base_lrs]
