"""k-means of the targets stages beside scikit-learn's MiniBatchKMeans with fairseq's settings, on the same frames.

fairseq's learn_kmeans.py: k-means++, batches of 10000, at most 100 epochs, tolerance 0, stop after 100 batches without
improvement, the best start of 20, no reassignment. The time that counts is ours to an inertia no larger than theirs:
our iterations are counted once, and that many are timed from the beginning.

For example: python benchmarks/bench_kmeans.py --threads 2 --rounds 3 --output kmeans.md
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits
from timing import Times, machine, number, table
from torch import Tensor

from espnet_mamba.data.manifest import read_manifest
from espnet_mamba.targets.features import iterate_features, open_layer
from espnet_mamba.targets.kmeans import BLOCK_FRAMES, fit_kmeans
from espnet_mamba.targets.sampling import choose_utterances

GOAL_RATIO = 20.0
MOST_ITERATIONS = 100
OURS, EQUAL, THEIRS = "ours", "ours to equal inertia", "MiniBatchKMeans"
STATES, DECAY, NOISE = 1500, 0.5, 0.5


class Case(NamedTuple):
    """What all candidates are given."""

    frames: Tensor  # (F, D)
    num_clusters: int
    threads: int
    seed: int
    starts: int  # n_init of scikit-learn


@functools.cache
def made_frames(count: int, width: int, seed: int) -> Tensor:
    """Return frames ``(F, D)`` that are somewhat like speech: states that last 1 to 11 frames and glide into each
    other, noise as wide as half of what lies between them, and a spectrum that falls, as that of layers does."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1).pow(-DECAY)
    centres = torch.randn(STATES, width, generator=generator) * scale
    lengths = torch.randint(1, 12, (count,), generator=generator)
    states = torch.repeat_interleave(torch.randint(STATES, (count,), generator=generator), lengths)[:count]
    frames = centres[states]
    frames[1:] = 0.7 * frames[1:] + 0.3 * centres[states[:-1]]
    return frames.add_(torch.randn(count, width, generator=generator).mul_(scale * NOISE))


def read_frames(model: str, folder: Path, layer: int, count: int) -> Tensor:
    """Return at most ``count`` frames of a model's layer over a checked set of recordings."""
    source = open_layer(model, layer)
    chosen = choose_utterances(read_manifest(folder), source.hop, count, 0)
    return torch.cat([layers[0].clone() for _, layers in iterate_features(source, chosen)])[:count]


def inertia(frames: Tensor, centroids: Tensor) -> float:
    """Return the mean squared distance of a frame to its nearest centroid, summed in double precision."""
    total, offsets = 0.0, centroids.square().sum(1)
    for block in frames.split(BLOCK_FRAMES):
        nearest = torch.addmm(offsets, block, centroids.T, alpha=-2.0).min(1).values + block.square().sum(1)
        total += nearest.sum(dtype=torch.float64).item()
    return total / len(frames)


def fit_theirs(case: Case) -> Tensor:
    """Fit as fairseq does."""
    with threadpool_limits(case.threads):
        model = MiniBatchKMeans(
            case.num_clusters,
            init="k-means++",
            max_iter=100,
            batch_size=10_000,
            tol=0.0,
            max_no_improvement=100,
            n_init=case.starts,
            reassignment_ratio=0.0,
            compute_labels=False,
            random_state=case.seed,
        ).fit(case.frames.numpy())
    return torch.from_numpy(np.ascontiguousarray(model.cluster_centers_, dtype=np.float32))


def fit_ours(case: Case, iterations: int | None = None) -> Tensor:
    """Fit as the stages do, or, where ``iterations`` are given, without a look at the improvement."""
    how = {} if iterations is None else {"num_iterations": iterations, "tolerance": 0.0}
    return fit_kmeans(case.frames, case.num_clusters, case.seed, num_threads=case.threads, **how)


def iterations_to(case: Case, goal: float) -> int | None:
    """Return how many iterations bring ours to an inertia of ``goal``; None when 100 do not.

    Ours is deterministic, and its first n iterations are the same whatever their number.
    """
    low, high = 0, 1
    while inertia(case.frames, fit_ours(case, high)) > goal:
        low, high = high, high * 2
        if low >= MOST_ITERATIONS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if inertia(case.frames, fit_ours(case, middle)) > goal:
            low = middle
        else:
            high = middle
    return high


def report(case: Case, rounds: int, their_rounds: int) -> str:
    """Time the candidates and return their table in Markdown, with the goal, met or missed, below it.

    Theirs takes minutes with fairseq's 20 starts: its first fit, which tells the goal, is its first round. Ours is
    fitted before it and in every round.
    """
    fits = {OURS: functools.partial(fit_ours, case), THEIRS: functools.partial(fit_theirs, case)}
    times, found = {name: Times() for name in (THEIRS, OURS, EQUAL)}, {}

    def fit(name: str) -> None:
        started = time.perf_counter()
        found[name] = fits[name]()
        times[name].seconds.append(time.perf_counter() - started)
        print(f"- {name}: {times[name].seconds[-1]:.1f} s", flush=True)

    fit(OURS)
    fit(THEIRS)
    goal = inertia(case.frames, found[THEIRS])
    iterations = iterations_to(case, goal)
    if iterations is not None:
        fits[EQUAL] = functools.partial(fit_ours, case, iterations)
    order = random.Random(case.seed)
    for number_ in range(rounds):
        names = [name for name in fits if name != THEIRS or 0 < number_ < their_rounds]
        for name in order.sample(names, len(names)):
            fit(name)
    rows = []
    for name in (name for name, own in times.items() if own.seconds):
        ratio = number(times[THEIRS].median / times[name].median)
        fitted = str(len(times[name].seconds))
        rows.append([name, times[name].cell(), fitted, ratio, f"{inertia(case.frames, found[name]):.6g}"])
    lines = [table(["candidate", "ms", "runs", f"{THEIRS} / it", "inertia per frame"], rows), ""]
    if iterations is None:
        return "\n".join([*lines, f"- goal: not reached: {MOST_ITERATIONS} iterations do not bring ours to {goal:.6g}"])
    ratio = times[THEIRS].median / times[EQUAL].median
    met = "met" if ratio >= GOAL_RATIO else "MISSED"
    lines.append(f"- ours is at that inertia after {iterations} iterations on all frames")
    lines.append(f"- goal: {THEIRS} / {EQUAL} >= {GOAL_RATIO:g}: {number(ratio)}, {met}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    if args.model:
        frames = read_frames(args.model, args.data, args.layer, args.frames)
        made = f"layer {args.layer} of {args.model} over {args.data}"
    else:
        frames = made_frames(args.frames, args.width, args.seed)
        made = f"made from seed {args.seed}: {STATES} states with spectrum i^-{DECAY}, noise {NOISE} of it"
    case = Case(frames, args.clusters, args.threads, args.seed, args.starts)
    parts = ["# k-means\n", machine("cpu")]
    parts.append(
        f"- scikit-learn {metadata.version('scikit-learn')}, numpy {np.__version__}\n"
        f"- frames: {len(frames)} x {frames.shape[1]}, {made}; K = {args.clusters}\n"
        f"- {args.rounds} rounds in shuffled order; medians [quartiles] of wall time\n"
    )
    print("\n".join(parts), flush=True)
    parts.append(report(case, args.rounds, args.their_rounds))
    print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=768, help="of made frames")
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument("--starts", type=int, default=20, help="n_init of scikit-learn; fairseq's is 20")
    parser.add_argument("--model", help="take frames of this model folder instead of made ones, or of mfcc, logmel")
    parser.add_argument("--layer", type=int, default=0, help="of the model")
    parser.add_argument("--data", type=Path, help="a checked set (dump/raw/train) to take them from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--their_rounds", type=int, default=1, help="of them with scikit-learn's, which takes minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    if min(args.frames, args.width, args.clusters, args.starts, args.rounds, args.threads) < 1:
        parser.error("--frames, --width, --clusters, --starts, --rounds, --threads: at least 1 expected")
    return args


if __name__ == "__main__":
    sys.exit(main())
