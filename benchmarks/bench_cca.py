"""CCA, PWCCA and CKA of all layers with all views: one pass of block covariance sums beside covariances per split.

``one pass`` is the analysis stage's own: sums per fold, folds recombined, CCA and CKA, nulls and intervals.
``per split`` computes the covariances from the frames anew for every split, and CCA only.
``per split and regularisation`` does so for every pair of regularisations and every null too, as scripts that call one
CCA function per pair do. The last two run a part of the layers and splits, which all cost the same, and their whole is
extrapolated; the report marks it.

For example: python benchmarks/bench_cca.py --threads 2 --rounds 3 --output cca.md
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bench_cca_inputs import Inputs, Size, make_inputs
from threadpoolctl import threadpool_limits
from timing import Job, machine, number, peak_memory, table, time_interleaved
from torch import Tensor

from espnet_mamba.analysis import cca
from espnet_mamba.analysis.covariance import FoldMoments, assign_folds
from espnet_mamba.analysis.similarity import SimilaritySettings, similarity_rows
from espnet_mamba.analysis.views import View

FORWARD = "forward"  # what timing.py calls a call without gradients
GOAL_SECONDS, GOAL_RATIO = 120.0, 10.0


class Case(NamedTuple):
    """The data, the settings, the threads, and how much of the slow candidates is run: layers and splits."""

    size: Size
    folds: int
    nulls: int
    threads: int
    part_layers: int
    part_trials: int

    @property
    def settings(self) -> SimilaritySettings:
        """The defaults of the analysis stage but for folds and nulls."""
        return SimilaritySettings(folds=self.folds, nulls=self.nulls, cca=cca.CcaSettings(trials=min(10, self.folds)))

    @property
    def factor(self) -> float:
        """By what the time of a part is multiplied to give the whole."""
        return self.size.layers / self.part_layers * self.settings.cca.trials / self.part_trials


class Rows(NamedTuple):
    """One layer beside one view: rows (R, D), ``target`` and the nulls by name, (R, d) each, and each row's fold."""

    x: np.ndarray
    y: dict[str, np.ndarray]
    fold: np.ndarray


inputs_of = functools.lru_cache(maxsize=1)(make_inputs)


def one_pass(case: Case) -> np.ndarray:
    """Return CCA and PWCCA, mean over splits, of every layer and view: (L, V, 2)."""
    inputs = inputs_of(case.size)
    rows = similarity_rows("bench", inputs.layers, inputs.views, case.settings, seed=0, num_threads=case.threads)
    values = {(row.layer, row.reference, row.measure): row.value for row in rows}
    return np.array(
        [
            [[values[layer, view.name, measure] for measure in cca.MEASURES] for view in inputs.views]
            for layer in range(case.size.layers)
        ]
    )


def per_split(case: Case) -> np.ndarray:
    """Return the scores of every split, (layers, V, splits, 2), from covariances computed anew for each."""
    settings = replace(case.settings.cca, trials=1)

    def one(rows: Rows, trial: int) -> np.ndarray:
        # Three parts stand for three folds: test, dev and train, in the order that cross_validate takes them.
        moments = _moments(rows, _parts(rows.fold, trial, case.folds))
        return cca.cross_validate(moments, "layer", "target", settings, [name for name in rows.y if name != "target"])

    return _loop(case, lambda rows, trial: one(rows, trial).scores[0])


def per_regularisation(case: Case) -> np.ndarray:
    """Return the same from one call of a CCA function per split, pair of regularisations and null."""
    settings = case.settings.cca
    pairs = [(wide, narrow) for wide in settings.eps_wide for narrow in settings.eps_narrow]

    def one(rows: Rows, trial: int) -> np.ndarray:
        test, dev, train = _parts(rows.fold, trial, case.folds)
        found = [plain_cca(rows.x, rows.y["target"], train, dev, pair) for pair in pairs]
        best = [pairs[int(np.argmax([scores[measure] for scores in found]))] for measure in range(2)]
        scores = {
            name: [plain_cca(rows.x, y, train, test, pair)[measure] for measure, pair in enumerate(best)]
            for name, y in rows.y.items()
        }
        return np.array(scores["target"])

    return _loop(case, one)


def plain_cca(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, eps: tuple[float, float]
) -> list[float]:
    """Return CCA and PWCCA on the ``test`` rows of directions fitted on the ``train`` rows: the definition, on rows.

    ``eps`` is for the wider view and the narrower, whose rank is how many pairs of directions there are.
    """
    if x.shape[1] < y.shape[1]:
        x, y = y, x
    deviation = y[train].std(0)
    views = []
    for view in (x, y):
        scale = view[train].std(0)
        views.append((view - view[train].mean(0)) / np.where(scale > 0.0, scale, np.inf))
    roots = []
    for view, amount in zip(views, eps, strict=True):
        eigenvalues, vectors = np.linalg.eigh(view[train].T @ view[train] / train.sum())
        keep = eigenvalues > 1e-10 * eigenvalues[-1] if view is views[1] else slice(None)
        roots.append(vectors[:, keep] / np.sqrt(np.maximum(eigenvalues[keep], 0.0) + amount))
    cross = views[0][train].T @ views[1][train] / train.sum()
    left, _, right = np.linalg.svd(roots[0].T @ cross @ roots[1], full_matrices=False)
    directions = roots[1] @ right.T
    variates = views[0][test] @ (roots[0] @ left), views[1][test] @ directions
    a, b = (side - side.mean(0) for side in variates)
    norm = np.sqrt(np.square(a).sum(0) * np.square(b).sum(0))
    held = (a * b).sum(0) / np.where(norm > 0.0, norm, np.inf)
    projected = views[1][train] @ directions
    unit = projected / np.linalg.norm(projected, axis=0)
    weights = np.abs(unit.T @ (views[1][train] * deviation)).sum(1)
    return [float(held.mean()), float(weights @ held / weights.sum())]


def _loop(case: Case, one: Callable[[Rows, int], np.ndarray]) -> np.ndarray:
    """Return ``one`` of a part of the layers and splits with all views: (layers, V, splits, 2)."""
    inputs = inputs_of(case.size)
    values = []
    for layer in range(case.part_layers):
        of_view = [_rows(inputs, layer, view, case.settings) for view in inputs.views]
        values.append([[one(rows, trial) for trial in range(case.part_trials)] for rows in of_view])
    return np.array(values)


def _rows(inputs: Inputs, layer: int, view: View, settings: SimilaritySettings) -> Rows:
    frames = dict(zip(inputs.layers.utt_ids, inputs.layers.of_utterance(layer), strict=True))
    folds = assign_folds(view.with_rows(), settings.folds, 0, view.labels)
    names = sorted(folds)
    x = np.concatenate([view.layer_rows(utt_id, frames[utt_id].numpy()) for utt_id in names]).astype(np.float64)
    y = {"target": np.concatenate([view.target_rows(utt_id) for utt_id in names])}
    for null in range(settings.nulls):
        donors = view.donors(null, 0)
        y[f"null{null}"] = np.concatenate([view.target_rows(utt_id, donors[utt_id]) for utt_id in names])
    counts = [len(view.units[utt_id].start) for utt_id in names]
    return Rows(x, y, np.repeat([folds[utt_id] for utt_id in names], counts))


def _parts(fold: np.ndarray, trial: int, folds: int) -> list[np.ndarray]:
    """Return which rows are test, dev and train: (R,) each."""
    test, dev = fold == trial, fold == (trial + 1) % folds
    return [test, dev, ~(test | dev)]


def _moments(rows: Rows, parts: Sequence[np.ndarray]) -> FoldMoments:
    """Return sums of products over some parts of the rows, straight from the rows."""
    views = {
        name: np.column_stack([view, np.square(view).mean(1), np.ones(len(view))])
        for name, view in {"layer": rows.x, **rows.y}.items()
    }
    pairs = [(name, name) for name in views] + [("layer", name) for name in rows.y]
    cut = [{name: view[part] for name, view in views.items()} for part in parts]
    blocks = {(a, b): np.stack([rows[a].T @ rows[b] for rows in cut]) for a, b in pairs}
    return FoldMoments({name: view.shape[1] - 2 for name, view in views.items()}, blocks, len(parts))


CANDIDATES: dict[str, Callable[[Case], np.ndarray]] = {
    "one pass": one_pass,
    "per split": per_split,
    "per split and regularisation": per_regularisation,
}
VALUES: dict[str, np.ndarray] = {}  # of each candidate's last run


def build_job(name: str, case: Case) -> Job:
    """Return a candidate with its inputs made."""
    inputs_of(case.size)

    def call() -> Tensor:
        # ``one pass`` shares layers among threads itself; the others have BLAS's.
        with nullcontext() if name == "one pass" else threadpool_limits(case.threads, user_api="blas"):
            VALUES[name] = CANDIDATES[name](case)
        return torch.from_numpy(VALUES[name])

    return Job(call, (), ())


def report(case: Case, names: Sequence[str], rounds: int, memory: bool) -> str:
    """Time the candidates and return their table in Markdown, with the goals beside it where they are met or missed."""
    times = time_interleaved({name: build_job(name, case) for name in names}, FORWARD, rounds, "cpu", seconds=1e4)
    cells, whole = [], {}
    for name in names:
        factor = 1.0 if name == "one pass" else case.factor
        whole[name] = times[name].median * factor
        # Memory does not grow with layers and splits: a part says it all.
        peaks = peak_memory(build_job, (name, case), [FORWARD], case.threads, "cpu") if memory else {}
        measured = times[name].cell() if factor == 1.0 else f"{times[name].cell()} of 1/{factor:g}"
        mark = " (extrapolated)" if factor != 1.0 else ""
        ratio = number(whole[name] / whole[names[0]])
        cells.append([name, measured, number(whole[name]) + mark, ratio, number(peaks.get(FORWARD, float("nan")))])
    head = ["candidate", "ms measured", "s whole", f"/ {names[0]}", "memory MiB"]
    notes = [f"- {name}: {times[name].note}" for name in names if times[name].note]
    return "\n".join([table(head, cells), "", *notes, *_agreement(names), *_goals(whole)])


def _agreement(names: Sequence[str]) -> list[str]:
    """Say how far the two slow candidates are apart, which run the same splits."""
    pair = [VALUES.get(name) for name in CANDIDATES if name != "one pass" and name in names]
    if len(pair) < 2 or any(values is None for values in pair):
        return []
    return [f"- largest difference of a score between the two: {np.abs(pair[0] - pair[1]).max():.1e}"]


def _goals(whole: dict[str, float]) -> list[str]:
    own = whole.get("one pass", float("nan"))
    lines = [f"- goal: one pass within {GOAL_SECONDS:g} s: {number(own)} s, {_met(own <= GOAL_SECONDS)}"]
    for name, seconds in whole.items():
        if name != "one pass":
            ratio = seconds / own
            lines.append(f"- goal: {name} / one pass >= {GOAL_RATIO:g}: {number(ratio)}, {_met(ratio >= GOAL_RATIO)}")
    return lines if own == own else []


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    size = Size(args.utterances, args.minutes, args.layers, args.width)
    case = Case(size, args.folds, args.nulls, args.threads, args.part_layers, args.part_trials)
    inputs = inputs_of(size)
    shape = ", ".join(f"{view.name} {view.num_rows} x {view.width}" for view in inputs.views)
    parts = ["# CCA and CKA of layers with views\n", machine("cpu")]
    parts.append(
        f"- {args.minutes:g} minutes: {len(inputs.layers.utterance)} frames, {size.utterances} utterances, "
        f"{size.layers} layers of width {size.width}; rows x width: {shape}\n"
        f"- {case.folds} folds, {case.nulls} nulls, {len(case.settings.cca.eps_wide)} x "
        f"{len(case.settings.cca.eps_narrow)} regularisations\n"
        f"- {args.rounds} interleaved rounds in shuffled order; medians [quartiles] of wall time\n"
        "- memory: peak above the frames of all layers, in a process of its own\n"
    )
    print("\n".join(parts), flush=True)
    parts.append(report(case, args.only or list(CANDIDATES), args.rounds, not args.no_memory))
    print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of speech, 3000 frames each")
    parser.add_argument("--utterances", type=int, default=180)
    parser.add_argument("--layers", type=int, default=13, help="0..12")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--folds", type=int, default=10)
    parser.add_argument("--nulls", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--part_layers", type=int, default=1, help="of the candidates per split")
    parser.add_argument("--part_trials", type=int, default=1, help="splits of the candidates per split; 10 are all")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), help="default: all")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--output", type=Path, help="also write the report there")
    args = parser.parse_args(arguments)
    for name in ("utterances", "layers", "width", "rounds", "threads", "part_layers", "part_trials"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: {getattr(args, name)} given, at least 1 expected")
    if args.folds < 3 or args.utterances < 5 * args.folds:
        parser.error(f"--folds: {args.folds} given, at least 3 and at most a fifth of the utterances expected")
    args.part_layers = min(args.part_layers, args.layers)
    args.part_trials = min(args.part_trials, 10, args.folds)
    return args


if __name__ == "__main__":
    sys.exit(main())
