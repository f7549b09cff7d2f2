"""Runs one SUPERB task for every system and compares the results over the same test utterances."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from espnet_mamba.asr import bootstrap
from espnet_mamba.asr.bootstrap import Interval
from espnet_mamba.asr.jobs import Job, run_jobs
from espnet_mamba.asr.preparation import merged, read_yaml
from espnet_mamba.asr.systems import System
from espnet_mamba.data.files import read_json, write_json
from s3prl_upstream.superb_data import choose_task, write_lists

METRICS = {"ic": "slot accuracy", "sid": "accuracy"}
FILTERBANK = "fbank"  # S3PRL's own upstream: 80 log-mel bins with first and second differences, normalised


def run_systems(
    config: Path, task: str, dump_dir: Path, out_dir: Path, systems: list[System], options: dict[str, Any], nj: int
) -> str:
    """Train and test the head of ``task`` on each system and return a table of the accuracies.

    Intents are scored by slots, with the share of utterances that have all slots right (SUPERB's accuracy) beside it.

    ``out_dir/<system>`` receives ``result.json`` and S3PRL's files, ``out_dir`` the lists and ``comparison.json``.
    A finished system whose options and inputs are the same is left alone.
    """
    task = choose_task(task, dump_dir)
    sections = read_yaml(config)
    unknown = sorted(sections.keys() - {"common", "ic", "sid"})
    if unknown:
        raise ValueError(f"{config}: section {unknown[0]!r} is none of common, ic, sid")
    settings = merged(merged(sections.get("common") or {}, sections.get(task) or {}), options)
    counts = write_lists(task, dump_dir, out_dir / "data")
    print(f"{task}: " + ", ".join(f"{split} {number}" for split, number in counts.items()) + " utterances", flush=True)
    jobs = []
    for system in systems:
        folder = out_dir / system.name
        inputs = _inputs(task, system, settings, out_dir)
        if (folder / "result.json").is_file() and read_json(folder / "inputs.json") == inputs:
            print(f"superb {system.name}: already done", flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / "inputs.json", inputs)
        args = (task, system, settings, out_dir)
        jobs.append(Job(f"superb {task} {system.name}", run_one, folder / "train.log", args))
    if jobs:
        import s3prl_upstream.superb  # noqa: F401 - imported once, shared by the forked processes

        run_jobs(jobs, nj, progress)
    return _compare(out_dir, systems)


def _inputs(task: str, system: System, settings: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Return all that a result depends on."""
    files = [out_dir / "data" / f"{split}.csv" for split in ("train", "valid", "test")]
    files += [system.upstream / "config.json", system.upstream / "model.safetensors"] if system.upstream else []
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]
    return {"task": task, "settings": settings, "upstream": str(system.upstream), "files": digests}


def run_one(task: str, system: System, settings: dict[str, Any], out_dir: Path) -> None:
    """Run S3PRL's problem for one system and write its ``result.json``."""
    import logging

    import omegaconf
    import torch

    from s3prl_upstream.superb import PREDICTIONS, PROBLEMS

    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    folder = out_dir / system.name
    problem = PROBLEMS[task]()
    upstream = {"name": FILTERBANK}
    if system.upstream is not None:
        upstream = {"name": "mamba_hubert", "path_or_url": str(system.upstream)}
    fixed = {
        "target_dir": str(folder / "s3prl"),
        "cache_dir": str(folder / "s3prl" / "cache"),
        "prepare_data": {"csv_dir": str((out_dir / "data").resolve())},
        "build_upstream": upstream,
    }
    conf = omegaconf.OmegaConf.merge(omegaconf.OmegaConf.create(problem.default_config()), settings, fixed)
    problem.run(**omegaconf.OmegaConf.to_container(conf, resolve=True, throw_on_missing=True))
    predictions = folder / "s3prl" / "evaluate" / "valid_best" / "test" / PREDICTIONS
    shutil.copy(predictions, folder / PREDICTIONS)
    table = read_json(predictions)
    weights = torch.load(folder / "s3prl/train/valid_best/model/state_dict.pt", weights_only=True)
    layers = weights.get("featurizer.weights")
    write_json(
        folder / "result.json",
        {
            "task": task,
            "system": system.name,
            "metric": METRICS[task],
            **_rate(table, slot_counts).as_dict(),
            "num_utts": len(table),
            "exact": _rate(table, exact_counts).as_dict(),
            "layer_weights": layers.softmax(0).tolist() if layers is not None else [],
        },
    )


def slot_counts(predictions: dict[str, dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return how many slots of each utterance are right, and how many there are, in the order of ids, each (U,)."""
    rows = [(_slots(row["prediction"]), _slots(row["label"])) for _, row in sorted(predictions.items())]
    right = [sum(found == label for found, label in zip(*row, strict=True)) for row in rows]
    return np.array(right), np.array([len(labels) for _, labels in rows])


def exact_counts(predictions: dict[str, dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return 1 for each utterance with all slots right, which is SUPERB's accuracy, and ones, each (U,)."""
    right, totals = slot_counts(predictions)
    return (right == totals).astype(int), np.ones_like(totals)


def _slots(label: str | list[str]) -> list[str]:
    return [label] if isinstance(label, str) else label


def _rate(predictions: dict[str, dict[str, Any]], counts: Callable[..., tuple[np.ndarray, np.ndarray]]) -> Interval:
    return bootstrap.rate(*counts(predictions))


def _compare(out_dir: Path, systems: list[System]) -> str:
    """Write the paired differences to ``random`` and return the table."""
    results = [read_json(out_dir / system.name / "result.json") for system in systems]
    metric = results[0]["metric"]
    lines = [f"{'system':<12} {metric + ' %':>22} {'all slots right %':>22} {'utterances':>10}"]
    for row in results:
        lines.append(f"{row['system']:<12} {_percent(row):>22} {_percent(row['exact']):>22} {row['num_utts']:>10}")
    tables = {system.name: read_json(out_dir / system.name / "predictions.json") for system in systems}
    if "random" not in tables or len(tables) < 2:
        return "\n".join(lines)
    base, totals = slot_counts(tables["random"])
    differences = {
        name: bootstrap.difference(slot_counts(table)[0], base, totals).as_dict()
        for name, table in tables.items()
        if name != "random"
    }
    comparison: dict[str, Any] = {"metric": metric, "against": "random", "differences": differences}
    if "pretrained" in differences:
        comparison["difference"] = differences["pretrained"]
    write_json(out_dir / "comparison.json", comparison)
    lines += [f"{metric} {name} - random, points: {_percent(row)}" for name, row in differences.items()]
    return "\n".join(lines)


def _percent(row: dict[str, float]) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def progress(log: str) -> str | None:
    """Return the state of a training from the end of S3PRL's progress bars."""
    found = re.findall(r"train: +\d+%[^\n]*?(\d+/\d+) \[([^\]]*)\]", log)
    return f"step {found[-1][0]} [{found[-1][1]}]" if found else None
