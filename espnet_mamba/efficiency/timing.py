"""Wall time and peak memory of the forward pass against the length of the audio: one utterance, eval, no gradient."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from espnet_mamba.efficiency.macs import SAMPLE_RATE
from espnet_mamba.efficiency.memory import peak_memory_mb
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.model import SsambaModel


@dataclass(frozen=True)
class Cost:
    """What one length costs; seconds of wall time, MiB of memory, ``rtf`` wall time over length of the audio."""

    audio_seconds: float
    wall_median: float
    wall_min: float
    wall_max: float
    rtf: float
    peak_memory_mb: float
    extra_memory_mb: float
    num_repeats: int


def measure_costs(
    models: Sequence[HubertModel | SsambaModel],
    lengths: Sequence[float],
    repeats: int,
    device: str = "cpu",
    warm_up: int = 2,
) -> list[list[Cost]]:
    """Return the costs of every model at every length (seconds): a list per model.

    Repeats are interleaved over models and lengths, so that a busy spell of the machine does not fall on one of them;
    memory is measured apart, from short to long.
    """
    calls = [[_forward(model, seconds, device) for seconds in lengths] for model in models]
    for row in calls:
        row[0]()  # loads what is loaded once, which is no length's memory
    memory = [[peak_memory_mb(call, device) for call in row] for row in calls]
    for row in calls:
        for call in row:
            for _ in range(max(0, warm_up - 1)):  # the memory pass was the first
                call()
    walls: list[list[list[float]]] = [[[] for _ in lengths] for _ in models]
    for repeat in range(repeats):
        for row, times in zip(calls, walls, strict=True):
            for call, own in zip(row, times, strict=True):
                own.append(_wall_time(call, device))
        print(f"repeat {repeat + 1} of {repeats} done", flush=True)
    return [
        [_cost(seconds, own, peak) for seconds, own, peak in zip(lengths, times, peaks, strict=True)]
        for times, peaks in zip(walls, memory, strict=True)
    ]


def _forward(model: HubertModel | SsambaModel, seconds: float, device: str) -> Callable[[], object]:
    num_samples = round(seconds * SAMPLE_RATE)
    wav = (0.1 * torch.randn(1, num_samples, generator=torch.Generator().manual_seed(0))).to(device)
    lengths = torch.tensor([num_samples], device=device)
    model = model.to(device).eval()

    def call() -> object:
        with torch.inference_mode():
            return model.extract_features(wav, lengths)

    return call


def _wall_time(call: Callable[[], object], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cost(seconds: float, walls: list[float], memory: tuple[float, float]) -> Cost:
    median = statistics.median(walls)
    return Cost(seconds, median, min(walls), max(walls), median / seconds, memory[0], memory[1], len(walls))
