"""The efficiency stage: costs of models against length, as tables, figures, crossings and a record of the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from espnet_mamba.data.files import write_json, write_text
from espnet_mamba.efficiency.crossover import Crossover, all_crossovers, macs_crossovers
from espnet_mamba.efficiency.entries import Entry
from espnet_mamba.efficiency.macs import SCAN_MACS
from espnet_mamba.efficiency.measure import Clock, Measurement
from espnet_mamba.efficiency.plots import by_size, curves_of, plot_costs, plot_parts
from espnet_mamba.efficiency.samples import LeftOut, Samples
from espnet_mamba.efficiency.settings import EfficiencySettings
from espnet_mamba.efficiency.streaming_cost import can_stream, streaming_costs
from espnet_mamba.efficiency.table import cost_rows, left_out_rows, macs_rows, markdown, write_csv
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.sizing import stream_state
from espnet_mamba.ops.selection import FORCE

MAC_MEANING = (
    "1 MAC = one multiplication and one addition; convolutions, linear layers and the scan "
    f"({SCAN_MACS} per frame, channel and state) are counted; norms, activations and gates are not"
)
EQUAL = 0.03  # models whose parameters differ by less than this share stand in the figure of equal parameters
LATE_SHARE, LATE_MINUTES = 0.07, 0.4  # of the minutes, and at least: for starting up and for the figures
_FIRST_FIGURE = ("eval", "one")


def run_efficiency(entries: Sequence[Entry], settings: EfficiencySettings, out_dir: str | Path) -> None:
    """Measure what fits into the minutes and the memory, and write it to ``out_dir``.

    Files: samples.jsonl (every repeat, as it comes; a run that was broken off goes on from it), efficiency.csv,
    macs.csv, left_out.csv, crossovers.csv, streaming.csv, efficiency.md, efficiency.json, and the figures
    efficiency[_<mode>][_batch][_<size>].{svg,png}, equal_parameters.{svg,png}, macs.{svg,png}.

    Raises:
        ValueError: a length below one frame of any model, or no cell that fits; one line.
    """
    out_dir = Path(out_dir)
    clock = Clock(settings.minutes - max(LATE_SHARE * settings.minutes, min(LATE_MINUTES, 0.5 * settings.minutes)))
    shortest = max(entry.shortest_samples for entry in entries) / 16000
    if settings.lengths[0] < shortest:
        raise ValueError(f"length {settings.lengths[0]:g} s: the least is {shortest:g} s (one frame)")
    samples = Samples(out_dir / "samples.jsonl", _setting(settings))
    measurement = Measurement(entries, settings, samples, clock)
    if settings.streaming:
        _measure_streaming(measurement)
    left_out = measurement.run()
    rows = cost_rows(entries, samples, settings.device, torch.get_num_threads())
    if not rows:
        raise ValueError(f"nothing could be measured: {left_out[0] if left_out else 'no time'}")
    lengths = sorted({row["audio_seconds"] for row in rows})
    write_csv(out_dir / "efficiency.csv", rows)
    write_csv(out_dir / "left_out.csv", left_out_rows(left_out))
    write_csv(out_dir / "macs.csv", macs_rows(entries, settings.lengths))
    streaming = [{"model": name, **row} for name, own in samples.streaming.items() for row in own]
    write_csv(out_dir / "streaming.csv", streaming)
    crossovers = _crossovers(entries, samples)
    write_csv(out_dir / "crossovers.csv", [asdict(crossing) for crossing in crossovers])
    told = _worth_telling(entries, crossovers)
    write_text(out_dir / "efficiency.md", _summary(entries, rows, left_out, told))
    write_json(out_dir / "efficiency.json", record(settings))
    _plot(entries, rows, left_out, told, settings, out_dir)
    parts = {
        e.name: e.macs_per_second(lengths[-1]) for e in entries if e.config is not None and e.same_weights_as is None
    }
    if parts:
        plot_parts(parts, lengths[-1], out_dir / "macs")
    _print(rows, streaming, told)


def record(settings: EfficiencySettings) -> dict[str, Any]:
    """Return what a reader must know of the machine and of how it was measured."""
    packages = ("torch", "torchaudio", "transformers", "espnet", "mamba-ssm", "numpy")
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device_name(settings.device),
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "batch": 1,
        "batch_seconds": settings.batch_seconds,
        "dtype": "float32",
        "mode": "eval: inference_mode, all hidden states kept; train: forward and backward pass, no optimizer; "
        "random audio, layer drop off",
        "memory": "peak of the resident set (CPU) or of PyTorch's allocator (CUDA) above the state before the call",
        "mac": MAC_MEANING,
        "settings": asdict(settings),
    }


def _measure_streaming(measurement: Measurement) -> None:
    """Measure chunks on the CPU, of models that can run in them, unless an earlier run did."""
    settings, samples = measurement.settings, measurement.samples
    if settings.device != "cpu":
        print("streaming: measured on the CPU only (one core per stream); left out on", settings.device, flush=True)
        return
    for entry in measurement.entries:
        config = entry.config
        if entry.name in samples.streaming or entry.same_weights_as or not isinstance(config, HubertConfig):
            continue
        if stream_state(config) is None:  # known without building the model
            continue
        if measurement.clock.left() < 0.8 * 60.0 * settings.minutes:
            print(f"{entry.name}: streaming left out; it gets a fifth of --minutes {settings.minutes:g}", flush=True)
            continue
        model = measurement.pool.get(entry.name)
        if can_stream(model):
            samples.add("streaming", streaming_costs(model, settings.chunks_ms, settings.histories), model=entry.name)


def _crossovers(entries: Sequence[Entry], samples: Samples) -> list[Crossover]:
    names = {entry.name for entry in entries}
    walls: dict[tuple[str, str, str], dict[float, Sequence[float]]] = {}
    memory: dict[tuple[str, str, str], dict[float, Sequence[float]]] = {}
    for cell in samples.cells:
        if cell.model in names:
            walls.setdefault(cell.series, {})[cell.audio_seconds] = samples.walls[cell]
            memory.setdefault(cell.series, {})[cell.audio_seconds] = [max(samples.memory[cell][1], 1e-3)]
    formulas = {
        entry.name: (lambda seconds, entry=entry: sum(entry.macs_per_second(seconds).values()))
        for entry in entries
        if entry.config is not None and entry.same_weights_as is None
    }
    found = all_crossovers(walls, "wall", True) + all_crossovers(memory, "memory", False)
    return found + macs_crossovers(formulas)


def _worth_telling(entries: Sequence[Entry], crossovers: Sequence[Crossover]) -> list[Crossover]:
    """Return the crossings between a model whose work grows with the square of the length and one whose does not.

    Those that most draws of the bootstrap do not have are noise.
    """
    attends = {entry.name: entry.attends for entry in entries}
    sure = [crossing for crossing in crossovers if not crossing.share < 0.5]  # nan: nothing was redrawn
    return [crossing for crossing in sure if attends[crossing.passes] != attends[crossing.passed]]


def _summary(
    entries: Sequence[Entry],
    rows: Sequence[dict[str, Any]],
    left_out: Sequence[LeftOut],
    crossovers: Sequence[Crossover],
) -> str:
    titles = {"rtf": "Real-time factor", "extra_memory_mb": "Peak memory above the model at rest (MiB)"}
    blocks = [markdown(entries, rows, left_out, key, title) for key, title in titles.items()]
    if crossovers:
        blocks.append("Crossings\n\n" + "\n".join(f"- {crossing}" for crossing in crossovers) + "\n")
    if left_out:
        blocks.append("Left out\n\n" + "\n".join(f"- {left}" for left in left_out) + "\n")
    return "\n".join(blocks)


def _plot(
    entries: Sequence[Entry],
    rows: Sequence[dict[str, Any]],
    left_out: Sequence[LeftOut],
    crossovers: Sequence[Crossover],
    settings: EfficiencySettings,
    out_dir: Path,
) -> None:
    ends = {left.cell.series: left.reason for left in left_out}
    for mode, batch in dict.fromkeys((row["mode"], row["batch"]) for row in rows):
        of_one = batch == "one"
        name = "efficiency" + (f"_{mode}" if mode != "eval" else "") + ("" if of_one else "_batch")
        what = "forward pass" if mode == "eval" else "forward and backward pass"
        audio = "one utterance" if of_one else f"{settings.batch_seconds:g} s of utterances"
        title = f"{what} of {audio}, {_device_name(settings.device)}"
        own = [c for c in crossovers if c.cost == "wall" and (c.mode, c.batch) == (mode, batch)]
        curves = curves_of(rows, ends, mode, batch)
        for size, names in by_size(list(curves)).items():
            plot_costs({model: curves[model] for model in names}, own, title, out_dir / f"{name}{size}")
        equal = _equal_parameters(entries, rows)
        if (mode, batch) == _FIRST_FIGURE and len(equal) > 1:
            chosen = {name: curve for name, curve in curves.items() if name in equal}
            within = f"{title}, models within {EQUAL:.0%} of {equal[0]}'s parameters"
            plot_costs(chosen, own, within, out_dir / "equal_parameters")


def _equal_parameters(entries: Sequence[Entry], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the largest attention model measured and all others of about its parameters; none if all attend."""
    sizes = {row["model"]: row["num_parameters"] for row in rows}
    attending = [entry.name for entry in entries if entry.attends and entry.name in sizes]
    if not attending:
        return []
    first = max(attending, key=lambda name: sizes[name])
    others = [name for name in sizes if name != first and abs(sizes[name] / sizes[first] - 1.0) <= EQUAL]
    return [first, *others] if set(others) - set(attending) else []


def _print(rows: Sequence[dict[str, Any]], streaming: Sequence[dict[str, Any]], told: Sequence[Crossover]) -> None:
    for row in rows:
        gmacs = float(row["macs_per_second"]) / 1e9
        print(
            f"{row['model']}, {row['mode']}: {row['batch_size']} x {row['audio_seconds']:g} s in "
            f"{row['wall_median']:.4f} s, RTF {row['rtf']:.4f}, {gmacs:.3f} GMAC per second, "
            f"{row['extra_memory_mb']:.0f} MiB"
        )
    for row in streaming:
        print(
            f"{row['model']}: {row['num_streams']} streams, chunks of {row['chunk_ms']:g} ms after "
            f"{row['history_seconds']:g} s: {1000 * row['wall_median']:.2f} ms a chunk, "
            f"{row['streams_per_core']:.1f} streams per core, {row['state_bytes'] / 1e6:.3f} MB each"
        )
    for crossing in told:
        print(crossing)


def _setting(settings: EfficiencySettings) -> dict[str, Any]:
    """Return what must be the same for samples of two runs to stand in one table."""
    keep = {
        "device": _device_name(settings.device),
        "torch": torch.__version__,
        "batch_seconds": settings.batch_seconds,
    }
    keep["backend"] = os.environ.get(FORCE, "auto")
    return keep | {"chunks_ms": settings.chunks_ms, "histories": settings.histories}


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
