"""Measuring cells within a time and a memory limit: first each once with its memory, then rounds of timed calls.

The first pass goes from little audio to much, so that a cell's memory and time are predicted from smaller ones before
it is called; in every round all models come in a new shuffled order, so that a busy spell of the machine falls on all
alike.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Sequence

from espnet_mamba.efficiency.entries import Entry
from espnet_mamba.efficiency.memory import peak_memory_mb
from espnet_mamba.efficiency.memory_limit import MEMORY_SHARE, available_memory_mb, is_out_of_memory, limited_memory
from espnet_mamba.efficiency.pool import ModelPool
from espnet_mamba.efficiency.prediction import Point, predict, prior_memory_mb, prior_wall
from espnet_mamba.efficiency.samples import Cell, LeftOut, Samples
from espnet_mamba.efficiency.settings import EfficiencySettings
from espnet_mamba.efficiency.timing import make_call, num_warm_ups, wall_time
from espnet_mamba.models.hubert import SAMPLE_RATE

_SLACK = 1.2  # a call may take this much longer than predicted
_SHORT = 0.5  # seconds: before a timed call as short as this, one untimed brings the model back into the caches


class Clock:
    """What is left of the minutes for the whole stage."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60.0 * minutes

    def left(self) -> float:
        """Return the seconds that are left; below 0 when they are over."""
        return self.end - time.monotonic()


def cells_of(entries: Sequence[Entry], settings: EfficiencySettings, seconds: float) -> list[Cell]:
    """Return all cells of one length; a length that a model has no frame for has none of its cells."""
    able = [entry for entry in entries if round(seconds * SAMPLE_RATE) >= entry.shortest_samples]
    size = int(settings.batch_seconds // seconds)
    batches = [("one", 1)] + ([("seconds", size)] if size > 1 else [])
    return [
        Cell(entry.name, mode, batch, number, seconds)
        for entry in able
        for mode in settings.modes
        for batch, number in batches
    ]


class Measurement:
    """One run of the stage over some entries; what it finds goes to ``samples``."""

    def __init__(self, entries: Sequence[Entry], settings: EfficiencySettings, samples: Samples, clock: Clock) -> None:
        self.entries, self.settings, self.samples, self.clock = entries, settings, samples, clock
        self.pool = ModelPool(entries, settings.device, samples)
        self.random = random.Random(settings.seed)
        self.left_out: list[LeftOut] = []

    def run(self) -> list[LeftOut]:
        """Measure what fits; return what was left out."""
        gc.collect()
        gc.freeze()  # the collection before each measurement of memory need not look at what was imported
        self.first_pass()
        for number in range(1, self.settings.repeats + 1):
            done = self.round(number)
            if done:
                print(f"round {number} of {self.settings.repeats}: {done} calls timed", flush=True)
        gc.unfreeze()
        self.left_out += [self._untimed(cell) for cell in self._wanted() if not self.samples.walls.get(cell)]
        return self.left_out

    def first_pass(self) -> None:
        """Call every cell once, from little audio to much, and measure its memory; leave out what will not fit."""
        cells = [cell for seconds in self.settings.lengths for cell in cells_of(self.entries, self.settings, seconds)]
        groups: dict[tuple[float, float], list[Cell]] = {}
        for cell in cells:  # a backward pass is twice a forward pass
            work = cell.total_seconds * (3.0 if cell.mode == "train" else 1.0)
            groups.setdefault((work, cell.audio_seconds), []).append(cell)
        for key in sorted(groups):
            for cell in self._by_model(groups[key]):
                if cell.series in {left.cell.series for left in self.left_out} or cell in self.samples.memory:
                    continue
                left = self._refusal(cell) or self._call_first(cell)
                if left is not None:
                    self.left_out.append(left)
                    print(left, flush=True)

    def round(self, number: int) -> int:
        """Time the cells that have fewer than ``number`` timed calls once each, while time is left; return how many."""
        open_cells = [cell for cell in self._wanted() if len(self.samples.walls.get(cell, ())) < number]
        done = 0
        for cell in self._by_model(open_cells):
            warm_ups = self._warm_ups_due(cell)
            expected = self.samples.first_wall[cell] * (1 + warm_ups)
            if self.clock.left() < expected * _SLACK:
                continue  # a shorter one may still fit
            call = make_call(self.pool.get(cell.model), cell.mode, cell.batch_size, cell.audio_seconds, self._device)
            for _ in range(warm_ups):
                call()
            wall = wall_time(call, self._device)
            if cell not in self.samples.warm_ups:
                self.samples.add("warm_up", 1 + warm_ups, cell)  # the call in which memory was measured is one
            self.samples.add("wall", wall, cell)
            done += 1
        return done

    @property
    def _device(self) -> str:
        return self.settings.device

    def _wanted(self) -> list[Cell]:
        """Return the cells of this run whose first call was made; a resumed file may hold others."""
        cells = [cell for s in self.settings.lengths for cell in cells_of(self.entries, self.settings, s)]
        return [cell for cell in cells if cell in self.samples.memory]

    def _by_model(self, cells: Sequence[Cell]) -> list[Cell]:
        """Shuffle models, and the cells of each; a model's stay together, so that it is built once."""
        models = list(dict.fromkeys(cell.model for cell in cells))
        self.random.shuffle(models)
        groups = [[cell for cell in cells if cell.model == model] for model in models]
        for group in groups:
            self.random.shuffle(group)
        return [cell for group in groups for cell in group]

    def _warm_ups_due(self, cell: Cell) -> int:
        wall = self.samples.first_wall[cell]
        if cell not in self.samples.warm_ups:
            return num_warm_ups(wall, self.settings.warm_up, self.settings.warm_up_seconds) - 1
        return int(wall < _SHORT)

    def _refusal(self, cell: Cell) -> LeftOut | None:
        """Say whether a cell will not fit into the memory or the time."""
        memory, limit = self._predicted_memory(cell), self._memory_limit()
        if memory > limit:
            note = (
                f"it would take {memory:.0f} MiB, the limit is {limit:.0f} MiB: a machine with more memory, a shorter "
                "length, or --memory_limit_mb"
            )
            return LeftOut(cell, "memory", memory, limit, note)
        wall = self._predicted_wall(cell)
        needed, left = self._calls_to_come(cell, wall) * wall * _SLACK, self.clock.left() - self._promised()
        if needed > left:
            minutes = math.ceil(self.settings.minutes + (needed - left) / 60.0)
            note = (
                f"it would take {needed:.0f} s ({wall:.1f} s a call), {max(0.0, left):.0f} s of "
                f"--minutes {self.settings.minutes:g} are not spoken for: --minutes {minutes}, or run again to go on"
            )
            return LeftOut(cell, "minutes", needed, max(0.0, left), note)
        return None

    def _untimed(self, cell: Cell) -> LeftOut:
        wall = self.samples.first_wall[cell]
        note = (
            f"its memory is known, but no time was left for a timed call ({wall:.1f} s): run again to go on, or more "
            f"than --minutes {self.settings.minutes:g}"
        )
        return LeftOut(cell, "minutes", wall, max(0.0, self.clock.left()), note)

    def _call_first(self, cell: Cell) -> LeftOut | None:
        """Call a cell for its memory; an allocation that fails is an answer, not an end."""
        limit = self._memory_limit()
        start = time.monotonic()
        walls: list[float] = []
        try:
            model = self.pool.get(cell.model)
            call = make_call(model, cell.mode, cell.batch_size, cell.audio_seconds, self._device)
            if cell.series not in {other.series for other in self.samples.memory}:
                call()  # loads what is loaded once, which is no length's memory
            with limited_memory(limit / MEMORY_SHARE, self._device):
                peaks = peak_memory_mb(lambda: walls.append(wall_time(call, self._device)), self._device)
        except (RuntimeError, MemoryError) as error:
            self.pool.drop(cell.model)
            failure = " ".join(str(error).split())[:160]
            reason = "memory" if is_out_of_memory(error) else "failed"
            del error  # its traceback holds the tensors of the call
            gc.collect()
            note = f"after {time.monotonic() - start:.1f} s it failed: {failure}; a shorter length works"
            return LeftOut(cell, reason, float("nan"), limit, note)
        self.samples.add("memory", [*peaks, walls[0]], cell)
        return None

    def _memory_limit(self) -> float:
        return self.settings.memory_limit_mb or MEMORY_SHARE * available_memory_mb(self._device)

    def _predicted_memory(self, cell: Cell) -> float:
        points = [Point(c.batch_size, c.audio_seconds, m[1]) for c, m in self.samples.memory.items() if _alike(c, cell)]
        if not points:
            return prior_memory_mb(cell.mode, cell.batch_size, cell.audio_seconds)
        return predict(points, cell.batch_size, cell.audio_seconds)

    def _predicted_wall(self, cell: Cell) -> float:
        walls = self.samples.first_wall
        points = [Point(c.batch_size, c.audio_seconds, wall) for c, wall in walls.items() if _alike(c, cell)]
        if points:
            return predict(points, cell.batch_size, cell.audio_seconds)
        parts = self.pool.entries[cell.model].macs_per_second(cell.audio_seconds)
        return prior_wall(cell.mode, sum(parts.values()) * cell.total_seconds)

    def _calls_to_come(self, cell: Cell, wall: float) -> int:
        """Return how many calls a cell still needs for the least number of repeats, its first included."""
        first = cell not in self.samples.memory
        warm_ups = 0
        if cell not in self.samples.warm_ups:
            warm_ups = num_warm_ups(wall, self.settings.warm_up, self.settings.warm_up_seconds) - 1
        return first + warm_ups + max(0, self.settings.least_repeats - len(self.samples.walls.get(cell, ())))

    def _promised(self) -> float:
        """Return the seconds that the cells begun so far still need."""
        walls = self.samples.first_wall
        return _SLACK * sum(self._calls_to_come(cell, walls[cell]) * walls[cell] for cell in self._wanted())


def _alike(cell: Cell, other: Cell) -> bool:
    return (cell.model, cell.mode) == (other.model, other.mode)
