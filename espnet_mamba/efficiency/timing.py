"""One call of a model, in eval or in training, and its wall time."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from espnet_mamba.models.hubert import SAMPLE_RATE


def make_call(model: nn.Module, mode: str, batch_size: int, seconds: float, device: str) -> Callable[[], None]:
    """Return a call of ``model.extract_features`` on random audio of ``batch_size`` utterances of ``seconds``.

    ``eval``: no gradients, all hidden states kept. ``train``: dropout on, forward and backward pass from the mean
    square of the last hidden state to every parameter; the gradients are dropped, no optimizer runs.
    """
    num_samples = round(seconds * SAMPLE_RATE)
    wavs = 0.1 * torch.randn(batch_size, num_samples, generator=torch.Generator().manual_seed(0))
    wavs, lengths = wavs.to(device), torch.full((batch_size,), num_samples, device=device)

    def evaluate() -> None:
        model.eval()
        with torch.inference_mode():
            model.extract_features(wavs, lengths)

    def train() -> None:
        model.train()
        layers, _ = model.extract_features(wavs, lengths)
        layers[-1].float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    return evaluate if mode == "eval" else train


def wall_time(call: Callable[[], object], device: str = "cpu") -> float:
    """Return the seconds that ``call`` takes; on a GPU, until its work is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def num_warm_ups(wall: float, most: int, seconds: float) -> int:
    """Return how many warm-up calls a call of ``wall`` seconds gets: 1 to ``most``, within ``seconds``."""
    return max(1, min(most, int(seconds / max(wall, 1e-9))))
