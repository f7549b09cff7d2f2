"""The selective scan: every backend that runs here beside other people's scans, with the goals that it is held to.

For example: python benchmarks/bench_scan.py --threads 2 --rounds 20 --output scan.md
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import goals
import torch
from peers import OTHERS, PEERS, Case, build_job, forget_inputs, inputs, output_grad, refusal
from timing import (
    PASSES,
    Job,
    Times,
    available_mb,
    machine,
    number,
    peak_memory,
    release_memory,
    table,
    time_interleaved,
    wall_time,
)

from espnet_mamba.ops.selection import relative_error
from espnet_mamba.ops.selective_scan import BACKENDS, selective_scan

CPU_SHAPES = ((4, 1536, 500, 16), (4, 2304, 500, 24), (8, 512, 250, 16), (1, 1536, 16000, 16))
CUDA_SHAPES = ((16, 2304, 750, 24),)
# Quadratic backward passes are run at a short length and extrapolated. It must not be so short that their tensors come
# from the allocator's reserve, where long ones are fresh pages every time (glibc: above 32 MiB): that is twice as fast.
SHORTEST, LARGE_MB = 64, 40
LONGEST_QUADRATIC = 500  # frames for which --slow runs them whole: minutes
# Peaks of smaller tensors drown in what the allocator does.
SMALLEST_ACTIVATION_MB = 1.0


@dataclass
class Row:
    """What was found about one candidate at one shape."""

    times: dict[str, Times] = field(default_factory=lambda: {which: Times() for which in PASSES})
    peaks: dict[str, float] = field(default_factory=dict)  # MiB
    error: float = float("nan")  # largest relative one of the output and all gradients


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    parts = ["# Selective scan\n", machine(args.device), f"- type: {args.dtype}", _legend(args)]
    _print("\n".join(parts))
    rows: dict[tuple[int, ...], dict[str, Row]] = {}
    for shape in args.shapes:
        case = Case(*shape, args.device, dtype)
        rows[shape] = measure(case, _names(args), args)
        parts.append(report(case, rows[shape]))
        _print(parts[-1])
    if args.device == "cpu":
        parts.append("## Goals\n\n" + "\n".join(goals.cpu_lines(rows)))
    else:
        for shape in args.shapes:
            found = {name: row.times[PASSES[1]].median for name, row in rows[shape].items()}
            parts.append(goals.cuda_lines(Case(*shape, args.device, dtype), found, args))
    _print(parts[-1])
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _print(text: str) -> None:
    print(text, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="B,E,T,N", help="default: those of the goals")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=[*BACKENDS, "none"])
    parser.add_argument("--peers", nargs="+", default=list(OTHERS), choices=[*OTHERS, "none"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, bfloat16 on cuda"
    )
    parser.add_argument("--slow", action="store_true", help="run quadratic backward passes whole: minutes each")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--no-errors", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--output", type=Path, help="also write the report there")
    parser.add_argument("--bandwidth_gbs", type=float, help="of the GPU's memory, where PyTorch does not tell")
    parser.add_argument("--clock_ghz", type=float, help="of the GPU, where PyTorch does not tell")
    args = parser.parse_args(arguments)
    cuda = args.device.startswith("cuda")
    args.shapes = args.shapes or (CUDA_SHAPES if cuda else CPU_SHAPES)
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    if args.rounds < 1:
        parser.error(f"--rounds: {args.rounds} given, at least 1 expected")
    return args


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form B,E,T,N") from error
    if len(shape) != 4 or min(shape) < 1 or shape[1] % 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form B,E,T,N with positive numbers and an even E")
    return shape


def _legend(args: argparse.Namespace) -> str:
    return (
        f"- {args.rounds} interleaved rounds in shuffled order; medians [quartiles] of wall time, fewer rounds for slow"
        " candidates; forward runs without gradients, f+b is forward and the gradients of all inputs\n"
        "- memory: peak above the state before, with outputs and gradients, in a process of its own"
    )


def _names(args: argparse.Namespace) -> list[str]:
    """Return the candidates in the order of the table; our kernels also in their other modes."""
    names = []
    for backend in args.backends:
        if backend == "none":
            continue
        names.append(backend)
        if backend == goals.kernel_of(args.device):
            names += [f"{backend} reverse", f"{backend} padded", f"{backend} both"]
    return names + [name for name in args.peers if name != "none"]


def measure(case: Case, names: Sequence[str], args: argparse.Namespace) -> dict[str, Row]:
    """Time all candidates at one shape, then their memory, then the errors of ours."""
    rows = {name: Row() for name in names}
    for which, label in enumerate(PASSES):
        jobs: dict[str, Job] = {}
        for name, row in rows.items():
            reason = refusal(name, case, which, available_mb(case.device))
            if reason:
                row.times[label].note = reason
            elif which == 1 and PEERS[name].quadratic and not _runs_whole(case, args):
                row.times[label] = _extrapolated(name, case)
            else:
                try:
                    jobs[name] = build_job(name, case)
                except Exception as error:  # a peer of another version must not end the benchmark of the others
                    row.times[label].note = f"failed: {type(error).__name__}: {error}"
        for name, times in time_interleaved(jobs, label, args.rounds, case.device).items():
            rows[name].times[label] = times
    del jobs
    forget_inputs()
    release_memory()
    if not args.no_memory and case.activation_mb >= SMALLEST_ACTIVATION_MB:
        for name, row in rows.items():
            passes = [label for label in PASSES if row.times[label].seconds and not row.times[label].note]
            if passes and max(row.times[label].median for label in passes) < 60:
                row.peaks = peak_memory(build_job, (name, case), passes, args.threads, case.device)
    if not args.no_errors:
        _add_errors(case, rows)
    return rows


def _short_frames(case: Case) -> int:
    return max(SHORTEST, math.ceil(LARGE_MB / case._replace(frames=1).states_mb))


def _runs_whole(case: Case, args: argparse.Namespace) -> bool:
    return case.frames <= _short_frames(case) or (args.slow and case.frames <= LONGEST_QUADRATIC)


def _extrapolated(name: str, case: Case) -> Times:
    """Scale a shorter run up: what is linear in T is taken to be three forward passes, and the rest is quadratic."""
    frames = _short_frames(case)
    job = build_job(name, case._replace(frames=frames))
    job.run(PASSES[0])  # warms up
    forward, both = (wall_time(job, which, case.device) for which in PASSES)
    scale, linear = case.frames / frames, min(both, 3 * forward)
    predicted = linear * scale + (both - linear) * scale**2
    return Times([predicted], f"predicted from T = {frames}, {both:.1f} s")


def _add_errors(case: Case, rows: dict[str, Row]) -> None:
    """Compare our backends with the definition in float64, or the chunked form in float64 where that is too big."""
    ours = [name for name in rows if name in BACKENDS and rows[name].times[PASSES[1]].seconds]
    if not ours:
        return
    fits = 16 * case.states_mb < 0.5 * available_mb("cpu")
    oracle = _results("reference" if fits else "torch", case, torch.float64)
    for name in ours:
        found = _results(name, case, case.dtype)
        pairs = zip(found, oracle, strict=True)
        rows[name].error = max(relative_error(a.cpu(), b) for a, b in pairs)
    forget_inputs()


def _results(backend: str, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the output and all gradients; for float64 the inputs are those of ``case``, rounded to its type."""
    device = "cpu" if dtype == torch.float64 else case.device
    leaves = {name: v.detach().to(device) for name, v in inputs(case).items()}
    if dtype == torch.float64:
        leaves = {name: v.to(dtype) for name, v in leaves.items()}
    leaves = {name: v.requires_grad_() for name, v in leaves.items()}
    y = selective_scan(**leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), output_grad(case).to(device, y.dtype))]


def report(case: Case, rows: dict[str, Row]) -> str:
    """Return one shape's table and notes in Markdown."""
    kernel = goals.kernel_of(case.device)
    own = rows[kernel].times[PASSES[1]].median if kernel in rows else float("nan")
    matmuls = rows["projections"].times[PASSES[1]].median if "projections" in rows else float("nan")
    head = ["candidate", "forward ms", "f+b ms", "rounds", "memory f / f+b MiB", f"f+b / {kernel}", "of the matmuls"]
    cells, notes = [], []
    for name, row in rows.items():
        forward, both = (row.times[label] for label in PASSES)
        if not forward.seconds and not both.seconds:
            notes.append(f"- {PEERS[name].title}: {forward.note or both.note}")
            continue
        share = both.median / matmuls
        cells.append(
            [
                PEERS[name].title,
                forward.cell(),
                both.cell() + (" *" if both.note and both.seconds else ""),
                f"{len(forward.seconds)} / {len(both.seconds)}",
                " / ".join(number(row.peaks.get(label, float("nan"))) for label in PASSES),
                number(both.median / own),
                f"{100 * share:.1f} %" if share == share else "-",
            ]
        )
        notes += [
            f"- {PEERS[name].title}, {w}: {t.note}" for w, t in zip(PASSES, (forward, both), strict=True) if t.note
        ]
    title = f"\n## {case.label}\n\none (B, T, E) is {number(case.activation_mb)} MiB\n"
    errors = [f"{name} {row.error:.1e}" for name, row in rows.items() if row.error == row.error]
    if errors:
        notes.append("- largest relative error of the output and all gradients against float64: " + ", ".join(errors))
    return "\n".join([title, table(head, cells), "", *notes, ""])


if __name__ == "__main__":
    sys.exit(main())
