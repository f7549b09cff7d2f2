"""Mutual information: all critics in one batched product beside the same work in a loop.

The published protocol (mine_paper) for U utterances of T frames and L layers of width D, against a plain loop over
utterances and layers; the held-out bounds for L layers and R seeds, against a loop over layers and seeds.

For example: python benchmarks/bench_analysis.py --threads 2 --rounds 5 --output analysis.md
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from timing import Job, Times, machine, number, peak_memory, table, time_interleaved
from torch import Tensor, nn

from espnet_mamba.analysis.bounds import BoundSettings, held_out_bounds
from espnet_mamba.analysis.mine import MinePaperSettings, UtterancePair, mine_paper

FORWARD = "forward"  # what timing.py calls a call without gradients of its inputs; training goes on inside


class Case(NamedTuple):
    """Sizes: numbers of utterances, layers and seeds; frames of an utterance; width; epochs and steps of training."""

    utterances: int
    frames: int
    layers: int
    width: int
    epochs: int
    seeds: int
    steps: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    case = Case(args.utterances, args.frames, args.layers, args.width, args.epochs, args.seeds, args.steps)
    parts = ["# Mutual information\n", machine("cpu")]
    parts.append(
        f"- {args.rounds} interleaved rounds in shuffled order; medians [quartiles] of wall time\n"
        "- memory: peak above the state before, in a process of its own"
    )
    print("\n".join(parts), flush=True)
    for title, candidates in _groups(case, args).items():
        parts.append(report(title, candidates, case, args))
        print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=8, help="of mine_paper; the paper has 1000, the goal 100")
    parser.add_argument("--frames", type=int, default=400, help="of an utterance")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--epochs", type=int, default=5, help="of mine_paper; 100 as published, time is linear in them")
    parser.add_argument("--seeds", type=int, default=5, help="of the held-out bounds")
    parser.add_argument("--steps", type=int, default=20, help="of the held-out bounds; the default of the code is 200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    for name in ("utterances", "frames", "layers", "width", "epochs", "seeds", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} given, at least 1 expected")
    if args.frames < MinePaperSettings().minibatch:
        parser.error(f"--frames: {args.frames} given, a minibatch of mine_paper has {MinePaperSettings().minibatch}")
    return args


def _groups(case: Case, args: argparse.Namespace) -> dict[str, list[str]]:
    names = args.only or list(CANDIDATES)
    shape = f"{case.layers} layers, width {case.width}"
    titles = (
        f"mine_paper: {case.utterances} utterances of {case.frames} frames, {shape}, {case.epochs} epochs",
        f"held-out bounds: {BOUND_UTTERANCES} utterances of {case.frames} frames, {shape}, {case.seeds} seeds, "
        f"{len(BoundSettings().estimators)} estimators, {case.steps} steps",
    )
    groups = {title: [name for name in names if GROUP[name] == index] for index, title in enumerate(titles)}
    return {title: members for title, members in groups.items() if members}


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


def batched_mine(case: Case) -> Tensor:
    """Return mine_paper's values (U, L)."""
    return mine_paper(_mine_input(case), MinePaperSettings(epochs=case.epochs))


def reused_mine(case: Case) -> Tensor:
    """Return mine_paper's values (U, L) with one critic for all, which leaves nothing to do side by side."""
    return mine_paper(_mine_input(case), MinePaperSettings(epochs=case.epochs, reuse_critic=True))


def _mine_input(case: Case) -> list[UtterancePair]:
    return utterances(case.utterances, case.frames, case.layers, case.width)


def looped_mine(case: Case, detect_anomaly: bool = False) -> Tensor:
    """Return the same protocol's values (U, L) by torch's own modules, one utterance and layer after the other."""
    settings = MinePaperSettings(epochs=case.epochs)
    torch.manual_seed(0)
    with torch.autograd.set_detect_anomaly(detect_anomaly):
        rows = [[_one_critic(pair.x, y, settings) for y in pair.y] for pair in _mine_input(case)]
    return torch.tensor(rows)


def _one_critic(x: Tensor, y: Tensor, settings: MinePaperSettings) -> float:
    both, hidden = x.shape[1] + y.shape[1], settings.hidden
    layers = (nn.Linear(both, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1))
    model = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)

    def bound(x: Tensor, y: Tensor) -> Tensor:
        joint = model(torch.cat([x, y], 1)).mean()
        shuffled = model(torch.cat([x, y[torch.randperm(len(y))]], 1))
        return joint - (torch.logsumexp(shuffled, 0) - math.log(len(y))).squeeze()

    for _ in range(settings.epochs):
        order = torch.randperm(len(x))
        for batch in order[: len(x) // settings.minibatch * settings.minibatch].split(settings.minibatch):
            optimizer.zero_grad()
            (-bound(x[batch], y[batch])).backward()
            optimizer.step()
    with torch.no_grad():
        return bound(x, y).item()


BOUND_UTTERANCES = 20


def _bound_input(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    pairs = utterances(BOUND_UTTERANCES, case.frames, case.layers, case.width)
    owner = torch.arange(BOUND_UTTERANCES).repeat_interleave(case.frames)
    return torch.cat([pair.x for pair in pairs]), torch.cat([pair.y for pair in pairs], 1), owner


def _bound_settings(case: Case, seeds: int) -> BoundSettings:
    # Few held-out frames: scoring all their pairs is the same work on both sides.
    return BoundSettings(
        steps=case.steps, check_every=case.steps, check_frames=200, held_out_frames=200, seeds=seeds, resamples=1
    )


def batched_bounds(case: Case) -> Tensor:
    """Return the held-out values (E, L), mean over seeds, of all critics trained at once."""
    x, y, owner = _bound_input(case)
    found = held_out_bounds(x, y, owner, _bound_settings(case, case.seeds))
    return torch.tensor([[bound.value for bound in bounds] for bounds in found.values()])


def looped_bounds(case: Case) -> Tensor:
    """Return the same by one call per layer and seed. Every call splits and standardises anew, as loops do."""
    x, y, owner = _bound_input(case)
    settings = _bound_settings(case, 1)
    values = []
    for seed in range(case.seeds):
        layers = [held_out_bounds(x, layer[None], owner, settings, seed) for layer in y]
        values.append([[bounds[name][0].value for bounds in layers] for name in settings.estimators])
    return torch.tensor(values).mean(0)


CANDIDATES: dict[str, Callable[[Case], Tensor]] = {
    "batched": batched_mine,
    "one critic reused, as published": reused_mine,
    "plain loop": looped_mine,
    "plain loop, anomaly detection on, as published": functools.partial(looped_mine, detect_anomaly=True),
    "batched bounds": batched_bounds,
    "loop over layers and seeds": looped_bounds,
}
VALUES: dict[str, Tensor] = {}  # of each candidate's last run
GROUP = {name: int(name in ("batched bounds", "loop over layers and seeds")) for name in CANDIDATES}


def build_job(name: str, case: Case) -> Job:
    """Return a candidate with its inputs made."""
    if GROUP[name]:
        _bound_input(case)
    else:
        _mine_input(case)

    def call() -> Tensor:
        with torch.enable_grad():
            VALUES[name] = CANDIDATES[name](case)
        return VALUES[name]

    return Job(call, (), ())


def report(title: str, names: Sequence[str], case: Case, args: argparse.Namespace) -> str:
    """Time candidates and return their table in Markdown; the ratio is to the first of them."""
    jobs = {name: build_job(name, case) for name in names}
    times: dict[str, Times] = time_interleaved(jobs, FORWARD, args.rounds, "cpu")
    cells = []
    for name in names:
        values = VALUES.get(name, torch.full((2,), torch.nan))
        memory = {} if args.no_memory else peak_memory(build_job, (name, case), [FORWARD], args.threads, "cpu")
        cells.append(
            [
                name,
                times[name].cell(),
                number(times[name].median / times[names[0]].median),
                str(len(times[name].seconds)),
                number(memory.get(FORWARD, float("nan"))),
                f"{values.mean():.3f} ({values.std():.3f})",
            ]
        )
    head = ["candidate", "ms", f"/ {names[0]}", "rounds", "memory MiB", "mean nats (sd)"]
    notes = [f"- {name}: {times[name].note}" for name in names if times[name].note]
    return "\n".join([f"\n## {title}\n", table(head, cells), "", *notes])


if __name__ == "__main__":
    sys.exit(main())
