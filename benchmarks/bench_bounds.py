"""Held-out bounds of mutual information: critics trained side by side, beside a plain loop over them.

For L layers of width D and R seeds, four estimators each. The plain loop (plain_bounds.py) trains one critic after the
other by autograd, with the split and the Gaussian scores made once, as in the batched form; the values are the same.

For example: python benchmarks/bench_bounds.py --widths 128 768 --threads 2 --rounds 3 --output bounds.md
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from plain_bounds import plain_bounds
from timing import Job, Times, machine, number, peak_memory, table, time_interleaved
from torch import Tensor

from espnet_mamba.analysis.bounds import BoundSettings, held_out_bounds

FORWARD = "forward"  # what timing.py calls a call without gradients of its inputs; training goes on inside


class Case(NamedTuple):
    """Sizes: numbers of utterances, layers and seeds; frames of an utterance; width; steps; held-out frames."""

    utterances: int
    frames: int
    layers: int
    width: int
    seeds: int
    steps: int
    held_out: int

    def settings(self, seeds: int) -> BoundSettings:
        """Return the settings: looks at the select part as often per step as by default, at the end at least."""
        return BoundSettings(steps=self.steps, held_out_frames=self.held_out, seeds=seeds, resamples=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    parts = ["# Held-out bounds of mutual information\n", machine("cpu")]
    parts.append(
        f"- {args.rounds} interleaved rounds in shuffled order; medians [quartiles] of wall time; CPU time of the last"
        "\n- memory: peak above the state before, in a process of its own"
    )
    print("\n".join(parts), flush=True)
    for width in args.widths:
        case = Case(args.utterances, args.frames, args.layers, width, args.seeds, args.steps, args.held_out_frames)
        parts.append(report(case, args))
        print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=20)
    parser.add_argument("--frames", type=int, default=400, help="of an utterance")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 768])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of training; the default of the code is 200")
    parser.add_argument("--held-out-frames", type=int, default=400, help="the default of the code is 4000")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES), help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    for name in ("frames", "layers", "seeds", "steps", "rounds", "held_out_frames"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)} given, at least 1 expected")
    if args.utterances < 6:
        parser.error(f"--utterances: {args.utterances} given, at least 6 expected: three parts of two")
    return args


@functools.lru_cache(maxsize=1)
def features(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (F, D), layers (L, F, D) with a common part, less of it the deeper the layer, and utterances (F,)."""
    generator = torch.Generator().manual_seed(0)
    total = case.utterances * case.frames
    x = torch.randn(total, case.width, generator=generator)
    y = torch.randn(case.layers, total, case.width, generator=generator)
    for share, layer in zip(torch.linspace(0.3, 0.1, case.layers), y, strict=True):
        layer.mul_((1.0 - share.square()).sqrt()).add_(x, alpha=float(share))
    return x, y, torch.arange(case.utterances).repeat_interleave(case.frames)


def batched(case: Case) -> Tensor:
    """Return the held-out values (E, L), mean over seeds."""
    found = held_out_bounds(*features(case), case.settings(case.seeds))
    return torch.tensor([[bound.value for bound in bounds] for bounds in found.values()])


def plain(case: Case) -> Tensor:
    """Return the same by the plain loop."""
    return torch.tensor(list(plain_bounds(*features(case), case.settings(case.seeds)).values()))


def called(case: Case) -> Tensor:
    """Return the held-out values by one call per layer and seed, which splits and fits Gaussian scores anew each."""
    x, y, owner = features(case)
    values = []
    for seed in range(case.seeds):
        layers = [held_out_bounds(x, layer[None], owner, case.settings(1), seed) for layer in y]
        values.append([[found[name][0].value for found in layers] for name in layers[0]])
    return torch.tensor(values).mean(0)


CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    "batched": batched,
    "plain loop over layers, seeds and estimators": plain,
    "a call per layer and seed": called,
}
LAST: dict[str, tuple[Tensor, float]] = {}  # values and CPU seconds of each candidate's last run


def build_job(name: str, case: Case) -> Job:
    """Return a candidate with its inputs made."""
    features(case)

    def call() -> Tensor:
        start = time.process_time()
        with torch.enable_grad():
            values = CANDIDATES[name](case)
        LAST[name] = values, time.process_time() - start
        return values

    return Job(call, (), ())


def report(case: Case, args: argparse.Namespace) -> str:
    """Time candidates and return their table in Markdown; the ratio is to the first of them."""
    names = args.only
    jobs = {name: build_job(name, case) for name in names}
    times: dict[str, Times] = time_interleaved(jobs, FORWARD, args.rounds, "cpu")
    cells = []
    for name in names:
        values, seconds = LAST.get(name, (torch.full((2,), torch.nan), float("nan")))
        memory = {} if args.no_memory else peak_memory(build_job, (name, case), [FORWARD], args.threads, "cpu")
        cells.append(
            [
                name,
                times[name].cell(),
                number(times[name].median / times[names[0]].median),
                number(seconds),
                str(len(times[name].seconds)),
                number(memory.get(FORWARD, float("nan"))),
                f"{values.mean():.4f}",
            ]
        )
    title = (
        f"\n## {case.utterances} utterances of {case.frames} frames, {case.layers} layers of width {case.width}, "
        f"{case.seeds} seeds, {case.steps} steps, {case.held_out} held-out frames\n"
    )
    head = ["candidate", "ms", f"/ {names[0]}", "CPU s", "rounds", "memory MiB", "mean nats"]
    notes = [f"- {name}: {times[name].note}" for name in names if times[name].note]
    return "\n".join([title, table(head, cells), "", *notes])


if __name__ == "__main__":
    sys.exit(main())
