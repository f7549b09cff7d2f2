"""What the scan is held to: ratios within one run, so that they mean the same on any machine; on a GPU also bounds."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peers import Case, lengths_of
from timing import PASSES, number

MIDDLE, SMALL = (4, 1536, 500, 16), (8, 512, 250, 16)
FORWARD_BACKWARD = PASSES[1]
# For what a padded batch costs whatever its lengths: zeros to write, uneven work for the threads.
PADDED_SLACK = 1.15
EXPONENTIALS_PER_CYCLE = 16  # of one SM's special-function units

Rows = dict[str, Any]  # name -> bench_scan.Row, at one shape


class Goal(NamedTuple):
    """One ratio and its limit."""

    text: str
    shape: tuple[int, int, int, int]
    measure: Callable[[Rows], float]  # NaN where it was not measured
    limit: float
    at_most: bool


def kernel_of(device: str) -> str:
    """Return the backend that the goals are about on a device."""
    return "cpu" if device == "cpu" else "triton"


def _seconds(rows: Rows, name: str) -> float:
    return rows[name].times[FORWARD_BACKWARD].median if name in rows else float("nan")


def _ratio(name: str, other: str) -> Callable[[Rows], float]:
    return lambda rows: _seconds(rows, name) / _seconds(rows, other)


def _padded(rows: Rows) -> float:
    case = Case(*MIDDLE)
    share = int(lengths_of(case).sum()) / (case.batch * case.frames)
    return _seconds(rows, "cpu padded") / _seconds(rows, "cpu") / share


def _memory(rows: Rows) -> float:
    peak = rows["cpu"].peaks.get(FORWARD_BACKWARD, float("nan")) if "cpu" in rows else float("nan")
    return peak / Case(*MIDDLE).activation_mb


GOALS = (
    Goal("cpu / the block's four matmuls", MIDDLE, _ratio("cpu", "projections"), 0.10, True),
    Goal("cpu / Transformer layer", MIDDLE, _ratio("cpu", "layer"), 0.05, True),
    Goal("cpu / the block's four matmuls", SMALL, _ratio("cpu", "projections"), 0.20, True),
    Goal("torch / the block's four matmuls", MIDDLE, _ratio("torch", "projections"), 0.9, True),
    Goal("loop with select / cpu", MIDDLE, _ratio("select", "cpu"), 5000, False),
    Goal("mambapy / cpu", MIDDLE, _ratio("mambapy", "cpu"), 100, False),
    Goal("torch / cpu", MIDDLE, _ratio("torch", "cpu"), 8, False),
    Goal("cpu reversed / cpu", MIDDLE, _ratio("cpu reverse", "cpu"), 1.05, True),
    Goal("cpu, padded batch: time / (cpu x share of valid frames)", MIDDLE, _padded, PADDED_SLACK, True),
    Goal("cpu, peak extra memory / one (B, T, E)", MIDDLE, _memory, 6, True),
)
LARGEST_ERROR = 5e-6


def cpu_lines(rows: dict[tuple[int, ...], Rows]) -> list[str]:
    """Return one line a goal: what it is, what was measured, met or missed."""
    lines = []
    for goal in GOALS:
        value = goal.measure(rows.get(goal.shape, {}))
        met = value <= goal.limit if goal.at_most else value >= goal.limit
        lines.append(_line(f"{goal.text} at {goal.shape}", value, goal.limit, goal.at_most, met))
    errors = [at_shape["cpu"].error for at_shape in rows.values() if "cpu" in at_shape]
    worst = max((error for error in errors if error == error), default=float("nan"))
    frames = max((shape[2] for shape in rows), default=0)
    text = f"cpu, largest relative error against float64 up to T = {frames}"
    return [*lines, _line(text, worst, LARGEST_ERROR, True, worst <= LARGEST_ERROR)]


def _line(text: str, value: float, limit: float, at_most: bool, met: bool) -> str:
    if value != value:
        return f"- goal {text}: not measured"
    shown = f"{value:.1e}" if 0 < value < 1e-3 else number(value)
    return f"- goal {text} {'<=' if at_most else '>='} {limit:,g}: measured {shown}, {'met' if met else 'MISSED'}"


def cuda_lines(case: Case, seconds: dict[str, float], args: argparse.Namespace) -> str:
    """Derive the two bounds of forward+backward on this card, and set ``triton`` against them and ``mamba_ssm``.

    Not run on a machine without a GPU. The units overlap, so the larger of both bounds holds.
    """
    card = torch.cuda.get_device_properties(case.device)
    clock = args.clock_ghz or getattr(card, "clock_rate", 0) / 1e6
    # The memory clock is in kHz, the bus in bits, and data moves on both edges.
    bandwidth = args.bandwidth_gbs or (
        2 * getattr(card, "memory_clock_rate", 0) * getattr(card, "memory_bus_width", 0) / 8 / 1e6
    )
    if not clock or not bandwidth:
        return "bounds: PyTorch does not tell this card's clocks, give --clock_ghz and --bandwidth_gbs"
    frames = case.batch * case.frames
    exponentials = frames * case.channels * case.states
    rate = EXPONENTIALS_PER_CYCLE * card.multi_processor_count * clock * 1e9
    # Forward: x, dt, z, y. Backward: x, dt, z, y's gradient, three gradients. Bmat and Cmat: read twice, written once.
    elements = 11 * frames * case.channels + 6 * frames * case.states
    moving = elements * case.dtype.itemsize / (bandwidth * 1e9)
    lines = [f"\n## Bounds of forward+backward at {case.label}\n"]
    bounds = {}
    for passes in (2, 3):
        bounds[passes] = passes * exponentials / rate
        lines.append(
            f"- exponentials: B T E N x {passes} = {passes * exponentials:.3g} (forward 1, backward {passes - 1}) over "
            f"{EXPONENTIALS_PER_CYCLE} a cycle x {card.multi_processor_count} SMs x {clock:.2f} GHz: "
            f"{1e3 * bounds[passes]:.3f} ms"
        )
    lines.append(f"- bytes: {elements} x {case.dtype.itemsize} over {bandwidth:.0f} GB/s: {1e3 * moving:.3f} ms")
    own, theirs = (seconds.get(name, float("nan")) for name in ("triton", "mamba_ssm"))
    share = max(bounds[2], moving) / own
    lines.append(_line("bound / triton (bound with backward 1)", share, 0.5, False, share >= 0.5))
    lines.append(_line("triton / mamba_ssm", own / theirs, 1.3, True, own / theirs <= 1.3))
    return "\n".join(lines)
