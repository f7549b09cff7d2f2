"""Which backend serves a call: by device, by what is installed, and by a comparison with the reference on first use."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks

log = logging.getLogger(__name__)


FORCE = "ESPNET_MAMBA_BACKEND"  # environment variable: what "auto" means, if not the best that is there


def requested(backend: str, names: tuple[str, ...], operation: str) -> str:
    """Return the backend that is asked for: the argument, or for ``auto`` what ``ESPNET_MAMBA_BACKEND`` says.

    Raises:
        ValueError: no such backend.
    """
    source = "backend"
    if backend == "auto" and os.environ.get(FORCE):
        backend, source = os.environ[FORCE], FORCE
    if backend not in ("auto", *names):
        raise ValueError(f"{operation}: {source} {backend!r} is not one of: auto {' '.join(names)}")
    return backend


@functools.cache
def say_once(level: int, message: str) -> None:
    """Log a message the first time only."""
    log.log(level, message)


class Selector:
    """Chooses among the backends of one operation and remembers what it found.

    Args:
        operation: the operation's name, for messages.
        preferred: device type -> backend names, best first.
        fallback: the backend that takes everything.
        unavailable: name -> why it cannot run on this machine, or an empty string.
        error: ``(name, device, dtype) -> `` the largest relative difference to the reference on a small input, outputs
            and gradients.
    """

    def __init__(
        self,
        operation: str,
        preferred: dict[str, list[str]],
        fallback: str,
        unavailable: Callable[[str], str],
        error: Callable[[str, torch.device, torch.dtype], float],
    ) -> None:
        self.operation = operation
        self.preferred = preferred
        self.fallback = fallback
        self.unavailable = unavailable
        self.error = error
        self.passed: dict[tuple[str, str, torch.dtype], bool] = {}

    def choose(self, backend: str, device: torch.device, dtype: torch.dtype) -> str:
        """Return the backend to use: ``auto`` resolved, and what does not run on this machine replaced, said once."""
        if backend != "auto":
            reason = self.unavailable(backend)
            if reason:
                return self.fall_back(backend, reason)
            return backend
        for name in self.preferred.get(device.type, []):
            if not self.unavailable(name) and self._agrees(name, device, dtype):
                return name
        return self.fallback

    def fall_back(self, backend: str, reason: str) -> str:
        """Return the fallback's name and say once why it is taken."""
        say_once(logging.WARNING, f"{self.operation}: backend {backend}: {reason}; using {self.fallback}")
        return self.fallback

    def _agrees(self, name: str, device: torch.device, dtype: torch.dtype) -> bool:
        """Compare with the reference the first time that a backend meets a device and a type."""
        key = (name, device.type, dtype)
        if key not in self.passed:
            # Not in the caller's mode: gradients are wanted, autocast and activation checkpointing are not.
            plain = (torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False))
            with plain[0], plain[1], plain[2], saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved):
                try:
                    error = self.error(name, device, dtype)
                except Exception as failure:  # a kernel that does not even run on this machine
                    self.passed[key] = False
                    self.fall_back(name, f"failed its check on first use ({type(failure).__name__}: {failure})")
                    return False
            limit = tolerance(dtype)
            self.passed[key] = error <= limit
            if self.passed[key]:
                say_once(logging.INFO, f"{self.operation}: backend {name} for {dtype} on {device.type}")
            else:
                self.fall_back(name, f"is off by {error:.1e} of the reference on {device.type}, limit {limit:.0e}")
        return self.passed[key]


def tolerance(dtype: torch.dtype) -> float:
    """Return how far a backend may be from the reference, relative to the largest value, for inputs of a type."""
    return {torch.float64: 1e-9, torch.float32: 1e-4}.get(dtype, 3e-2)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference over the largest expected value; infinite where ``got`` is not finite."""
    got, expected = got.detach().double(), expected.detach().double()
    difference = (got - expected).abs()
    if not torch.isfinite(difference).all():
        return float("inf")
    return float(difference.max() / expected.abs().max().clamp(min=1e-30))
