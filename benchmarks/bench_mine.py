"""mine_paper, the published mutual information protocol, beside the same protocol in a plain loop.

U utterances of T frames, L layers of width D. The loops are torch's modules, autograd and torch.optim.Adam, one
utterance and layer after the other: as published (a permutation an epoch, anomaly detection on, loss.item() after every
step), without anomaly detection, without the item too, and with batches from a DataLoader. Beside them the floor: the
time of the products that remain when none is taken twice, at the rate that one large product reaches here.

For example: python benchmarks/bench_mine.py --threads 2 --rounds 5 --output mine.md
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Job, Times, machine, number, peak_memory, table, time_interleaved
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from espnet_mamba.analysis.mine import MinePaperSettings, UtterancePair, mine_paper

FORWARD = "forward"  # what timing.py calls a call without gradients of its inputs; training goes on inside
GOAL = 15.0  # times the plain loop
OURS = ("mine_paper, float32", "mine_paper, bfloat16")


class Case(NamedTuple):
    """Sizes: numbers of utterances, frames of an utterance, layers, width, epochs of training."""

    utterances: int
    frames: int
    layers: int
    width: int
    epochs: int

    @property
    def steps(self) -> int:
        """Steps of all critics together."""
        return self.utterances * self.layers * self.epochs * (self.frames // MinePaperSettings().minibatch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    parts = ["# The published mutual information protocol\n", machine("cpu")]
    parts.append(
        f"- {args.rounds} interleaved rounds in shuffled order; medians [quartiles] of wall time\n"
        "- memory: peak above the state before, in a process of its own"
    )
    print("\n".join(parts), flush=True)
    for width in args.widths:
        case = Case(args.utterances, args.frames, args.layers, width, args.epochs)
        parts.append(report(args.only or list(CANDIDATES), case, args))
        print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=2, help="the paper has 1000, the goal 100: time is linear")
    parser.add_argument("--frames", type=int, default=400, help="of an utterance")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 128])
    parser.add_argument("--epochs", type=int, default=20, help="100 as published; time is linear")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    sizes = [(f"--{name}", getattr(args, name)) for name in ("utterances", "layers", "epochs", "rounds", "threads")]
    for name, value in [*sizes, *(("--widths", width) for width in args.widths)]:
        if value < 1:
            parser.error(f"{name}: {value} given, at least 1 expected")
    if args.frames < MinePaperSettings().minibatch:
        parser.error(f"--frames: {args.frames} given, a minibatch of mine_paper has {MinePaperSettings().minibatch}")
    return args


@functools.lru_cache(maxsize=1)
def utterances(count: int, frames: int, layers: int, width: int) -> list[UtterancePair]:
    """Return noise with a common part in every layer, less of it the deeper the layer."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for index in range(count):
        x = torch.randn(frames, width, generator=generator)
        noise = torch.randn(layers, frames, width, generator=generator)
        share = torch.linspace(0.9, 0.1, layers)[:, None, None]
        pairs.append(UtterancePair(f"u{index}", x, share * x + (1.0 - share.square()).sqrt() * noise))
    return pairs


def _input(case: Case) -> list[UtterancePair]:
    return utterances(case.utterances, case.frames, case.layers, case.width)


def ours(case: Case, precision: str = "float32", reuse_critic: bool = False) -> Tensor:
    """Return mine_paper's values (U, L)."""
    return mine_paper(
        _input(case), MinePaperSettings(epochs=case.epochs, precision=precision, reuse_critic=reuse_critic)
    )


def looped(case: Case, anomaly: bool = False, item: bool = False, loader: bool = False) -> Tensor:
    """Return the same protocol's values (U, L) by torch's own modules, one utterance and layer after the other."""
    settings = MinePaperSettings(epochs=case.epochs)
    torch.manual_seed(0)
    batches = _loaded if loader else _permuted
    with torch.autograd.set_detect_anomaly(anomaly):
        rows = [[_one_critic(pair.x, y, settings, batches, item) for y in pair.y] for pair in _input(case)]
    return torch.tensor(rows)


Batches = Callable[[Tensor, Tensor, MinePaperSettings], Iterator[tuple[Tensor, Tensor]]]


def _permuted(x: Tensor, y: Tensor, settings: MinePaperSettings) -> Iterator[tuple[Tensor, Tensor]]:
    size = settings.minibatch
    for _ in range(settings.epochs):
        order = torch.randperm(len(x))
        x_now, y_now = x[order], y[order]
        for start in range(0, len(x) // size * size, size):
            yield x_now[start : start + size], y_now[start : start + size]


def _loaded(x: Tensor, y: Tensor, settings: MinePaperSettings) -> Iterator[tuple[Tensor, Tensor]]:
    loader = DataLoader(TensorDataset(x, y), settings.minibatch, shuffle=True, drop_last=True)
    for _ in range(settings.epochs):
        yield from loader


def _one_critic(x: Tensor, y: Tensor, settings: MinePaperSettings, batches: Batches, item: bool) -> float:
    both, hidden = x.shape[1] + y.shape[1], settings.hidden
    layers = (nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)

    def bound(x: Tensor, y: Tensor) -> Tensor:
        joint = model(torch.cat([x, y], 1)).mean()
        shuffled = model(torch.cat([x, y[torch.randperm(len(y))]], 1))
        return joint - (torch.logsumexp(shuffled, 0) - math.log(len(y))).squeeze()

    total = 0.0
    for x_batch, y_batch in batches(x, y, settings):
        optimizer.zero_grad()
        loss = -bound(x_batch, y_batch)
        loss.backward()
        optimizer.step()
        if item:
            total -= loss.item()
    with torch.no_grad():
        return bound(x, y).item()


CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    OURS[0]: ours,
    OURS[1]: functools.partial(ours, precision="bfloat16"),
    "one critic reused, as published": functools.partial(ours, reuse_critic=True),
    "loop, plainest": looped,
    "loop, loss.item()": functools.partial(looped, item=True),
    "loop as published: item, anomaly detection": functools.partial(looped, item=True, anomaly=True),
    "loop, DataLoader": functools.partial(looped, loader=True),
    "loop, DataLoader, item, anomaly detection": functools.partial(looped, loader=True, item=True, anomaly=True),
}
VALUES: dict[str, Tensor] = {}  # of each candidate's last run


def build_job(name: str, case: Case) -> Job:
    """Return a candidate with its inputs made."""
    _input(case)

    def call() -> Tensor:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Anomaly Detection")
            VALUES[name] = CANDIDATES[name](case)
        return VALUES[name]

    return Job(call, (), ())


def floor_lines(case: Case, threads: int) -> list[str]:
    """Return a line a precision: operations of a step's products, the rate of a large product, milliseconds a step."""
    settings = MinePaperSettings()
    first = 8 * settings.minibatch * case.width * settings.hidden  # x and y, forward and gradient, 2 B D H each
    second = 3 * 4 * settings.minibatch * settings.hidden**2  # 2 B pairs: forward, gradient of weights and of input
    lines = []
    for precision in (torch.float32, torch.bfloat16):
        rate = _rate(precision, settings, case.layers)
        lines.append(
            f"- floor, {precision}: {(first + second) / 1e6:.1f} M operations a step at {rate / 1e9:.0f} G/s a core: "
            f"{1e3 * (first + second) / rate / threads:.3f} ms a step on {threads} cores"
        )
    return lines


def _rate(precision: torch.dtype, settings: MinePaperSettings, layers: int) -> float:
    """Return operations a second of one core in the product of all layers' Wx at width 768, the best of 50."""
    threads, height = torch.get_num_threads(), layers * settings.hidden
    weight, x = (torch.randn(rows, 768).to(precision) for rows in (height, settings.minibatch))
    torch.set_num_threads(1)
    seconds = []
    for _ in range(50):
        start = time.perf_counter()
        weight @ x.T
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2 * settings.minibatch * 768 * height / min(seconds)


def report(names: Sequence[str], case: Case, args: argparse.Namespace) -> str:
    """Time candidates and return their table, the floor and the goal in Markdown."""
    jobs = {name: build_job(name, case) for name in names}
    times: dict[str, Times] = time_interleaved(jobs, FORWARD, args.rounds, "cpu")
    cells = []
    for name in names:
        values = VALUES.get(name, torch.full((2, 2), torch.nan))
        memory = {} if args.no_memory else peak_memory(build_job, (name, case), [FORWARD], args.threads, "cpu")
        ratios = [times[name].median / times[mine].median if mine in times else float("nan") for mine in OURS]
        cells.append(
            [
                name,
                times[name].cell(),
                f"{1e3 * times[name].median / case.steps:.3f}",
                *map(number, ratios),
                str(len(times[name].seconds)),
                number(memory.get(FORWARD, float("nan"))),
                f"{values.mean():.3f} ({values.std(0, correction=0).mean():.3f})",
            ]
        )
    head = ["candidate", "ms", "ms a step", "/ float32", "/ bfloat16", "rounds", "memory MiB", "mean nats (sd of utts)"]
    notes = [f"- {name}: {times[name].note}" for name in names if times[name].note]
    title = f"{case.utterances} utterances of {case.frames} frames, {case.layers} layers, width {case.width}, "
    lines = [f"\n## {title}{case.epochs} epochs\n", table(head, cells), "", *notes, *floor_lines(case, args.threads)]
    return "\n".join([*lines, *goal_lines(times)])


def goal_lines(times: dict[str, Times]) -> list[str]:
    """Return a line a loop and precision: how many times faster, the goal met or missed."""
    return [
        f"- goal {name} / {mine} >= {GOAL:g}: measured {number(ratio)}, {'met' if ratio >= GOAL else 'MISSED'}"
        for name in times
        if name.startswith("loop")
        for mine in OURS
        if mine in times and (ratio := times[name].median / times[mine].median) == ratio
    ]


if __name__ == "__main__":
    sys.exit(main())
