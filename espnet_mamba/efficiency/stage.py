"""The efficiency stage: costs of some models at some lengths, as tables, figures, and a record of the machine."""

from __future__ import annotations

import csv
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from espnet_mamba.data.files import atomic_path, write_json
from espnet_mamba.efficiency.macs import SCAN_MACS, macs_per_second, shortest_samples
from espnet_mamba.efficiency.plots import plot_costs, plot_parts
from espnet_mamba.efficiency.timing import measure_costs
from espnet_mamba.models.config import load_config
from espnet_mamba.models.folders import load_model
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.model import SsambaModel

MAC_MEANING = (
    "1 MAC = one multiplication and one addition; convolutions, linear layers and the scan "
    f"({SCAN_MACS} per frame, channel and state) are counted; norms, activations and gates are not"
)


def open_models(upstreams: Sequence[str], configs: Sequence[str]) -> dict[str, HubertModel | SsambaModel]:
    """Return name -> model: folders with their weights, YAML configs with random ones (the cost is the same)."""
    models: dict[str, HubertModel | SsambaModel] = {}
    for model in [load_model(folder) for folder in upstreams] + [HubertModel(load_config(c)) for c in configs]:
        name = model.config.name
        if name in models:
            raise ValueError(f"two models are called {name!r}; give each model once")
        models[name] = model
    if not models:
        raise ValueError("no model to measure; give --upstream FOLDER or --config conf/models/NAME.yaml")
    return models


def run_efficiency(
    models: Mapping[str, HubertModel | SsambaModel],
    lengths: Sequence[float],
    repeats: int,
    out_dir: str | Path,
    device: str,
) -> None:
    """Measure and write efficiency.csv, macs.csv, efficiency.json, and the figures to ``out_dir``."""
    lengths = sorted(set(lengths))
    shortest = max(shortest_samples(model.config) for model in models.values()) / 16000
    if lengths[0] < shortest or repeats < 1:
        raise ValueError(f"lengths {lengths[0]:g} s, repeats {repeats}: the least are {shortest:g} s (one frame) and 1")
    parts = {name: [macs_per_second(m.config, s) for s in lengths] for name, m in models.items()}
    costs = dict(zip(models, measure_costs(list(models.values()), lengths, repeats, device), strict=True))
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = [
        {"model": name, "num_parameters": sum(p.numel() for p in models[name].parameters())}
        | {"device": device, "num_threads": torch.get_num_threads()}
        | {"macs_per_second": round(sum(own.values()))}
        | {key: _round(value) for key, value in vars(cost).items()}
        for name in models
        for cost, own in zip(costs[name], parts[name], strict=True)
    ]
    _write_csv(out_dir / "efficiency.csv", rows)
    _write_csv(
        out_dir / "macs.csv",
        [
            {"model": name, "audio_seconds": seconds, "part": part, "macs_per_second": round(macs)}
            for name in models
            for seconds, own in zip(lengths, parts[name], strict=True)
            for part, macs in own.items()
        ],
    )
    totals = {name: [sum(own.values()) for own in rows] for name, rows in parts.items()}
    plot_costs(costs, totals, _device_name(device), out_dir / "efficiency")
    plot_parts({name: own[-1] for name, own in parts.items()}, lengths[-1], out_dir / "macs")
    write_json(out_dir / "efficiency.json", _record(device, repeats))
    for row in rows:
        print(
            f"{row['model']}: {row['audio_seconds']:g} s in {row['wall_median']:.4f} s, RTF {row['rtf']:.4f}, "
            f"{row['macs_per_second'] / 1e9:.3f} GMAC per second, {row['extra_memory_mb']:.0f} MiB",
            flush=True,
        )


def _round(value: float) -> float:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _record(device: str, repeats: int) -> dict[str, Any]:
    return {
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device_name(device),
        "machine": platform.machine(),
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "batch": 1,
        "dtype": "float32",
        "mode": "eval, inference_mode, random audio, all hidden states kept",
        "num_repeats": repeats,
        "mac": MAC_MEANING,
    }
