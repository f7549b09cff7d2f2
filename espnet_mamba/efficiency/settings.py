"""What the efficiency stage measures, and the limits that it keeps to."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("eval", "train")
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0, 3600.0)  # paper 2's are 5 to 320 s
CHUNKS_MS = (20.0, 100.0, 500.0)
HISTORIES = (10.0, 60.0)


@dataclass(frozen=True)
class EfficiencySettings:
    """Lengths in seconds of audio at 16 kHz; everything random is drawn by ``seed``."""

    lengths: tuple[float, ...] = LENGTHS
    modes: tuple[str, ...] = MODES  # eval: without gradients; train: forward and backward pass, dropout on
    batch_seconds: float = 40.0  # seconds of audio in a batch, beside batches of one; 0: batches of one alone
    repeats: int = 10  # timed calls of each cell at most
    least_repeats: int = 3  # a cell that would not get as many within ``minutes`` is left out
    warm_up: int = 10  # calls before the first timed one; fewer where that would take more than warm_up_seconds
    warm_up_seconds: float = 1.0
    minutes: float = 10.0  # for everything
    memory_limit_mb: float = 0.0  # MiB that one call may add; 0: MEMORY_SHARE of what is available before it
    device: str = "cpu"
    streaming: bool = True  # also the cost of chunks, of models that can run in chunks
    chunks_ms: tuple[float, ...] = CHUNKS_MS
    histories: tuple[float, ...] = HISTORIES  # seconds that a stream has heard, where its cost depends on that
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(sorted({float(s) for s in self.lengths})))
        for mode in self.modes:
            if mode not in MODES:
                raise ValueError(f"modes: {mode!r} is not one of: {' '.join(MODES)}")
        least = {"repeats": 1, "least_repeats": 1, "warm_up": 1, "batch_seconds": 0, "memory_limit_mb": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ValueError(f"{name}: {getattr(self, name)} is below {limit}; give at least {limit}")
        if not self.lengths or self.lengths[0] <= 0:
            raise ValueError(f"lengths: {list(self.lengths)} s; give lengths above 0")
        if self.minutes <= 0:
            raise ValueError(f"minutes: {self.minutes} is not above 0")
        if not self.modes:
            raise ValueError(f"modes: none is given; known: {' '.join(MODES)}")
        object.__setattr__(self, "least_repeats", min(self.least_repeats, self.repeats))
