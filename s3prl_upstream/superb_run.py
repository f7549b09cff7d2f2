"""Runs one SUPERB task for every system and compares the results over the same test utterances."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from espnet_mamba.asr import bootstrap
from espnet_mamba.asr.jobs import Job, run_jobs
from espnet_mamba.asr.preparation import merged, read_yaml
from espnet_mamba.asr.systems import System
from espnet_mamba.data.files import read_json, write_json
from s3prl_upstream.superb_data import choose_task, write_lists
from s3prl_upstream.superb_keywords import KeywordOptions, utterance_of

METRIC = "accuracy"  # SUPERB's for keywords, speakers, and intents (there: all slots right)
SECTIONS = ("common", "ks", "ic", "sid")
Table = dict[str, dict[str, Any]]  # {example: {"prediction": ..., "label": ...}}
Counts = tuple[np.ndarray, np.ndarray]
FILTERBANK = "fbank"  # S3PRL's own upstream: log-mel bins with their differences, mean and variance normalised


def run_systems(
    config: Path, task: str, dump_dir: Path, out_dir: Path, systems: list[System], options: dict[str, Any], nj: int
) -> str:
    """Train and test the head of ``task`` on each system and return a table of the accuracies.

    Intents count when all their slots are right, with the share of right slots beside it.

    ``out_dir/<system>`` receives ``result.json`` and S3PRL's files, ``out_dir`` the lists and ``comparison.json``.
    A finished system whose options and inputs are the same is left alone.
    """
    task = choose_task(task, dump_dir)
    sections = read_yaml(config)
    unknown = sorted(sections.keys() - set(SECTIONS))
    if unknown:
        raise ValueError(f"{config}: section {unknown[0]!r} is none of {', '.join(SECTIONS)}")
    settings = merged(merged(sections.get("common") or {}, sections.get(task) or {}), options)
    keywords = _keyword_options(config, settings.pop("keywords", {}))
    counts = write_lists(task, dump_dir, out_dir / "data", keywords)
    print(f"{task}: " + ", ".join(f"{split} {number}" for split, number in counts.items()) + " examples", flush=True)
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


def _keyword_options(config: Path, values: dict[str, Any]) -> KeywordOptions:
    unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(KeywordOptions)})
    if unknown:
        raise ValueError(f"{config}: keywords: {unknown[0]!r} is no option of the lists of keywords")
    return KeywordOptions(**values)


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

    from espnet_mamba.models.folders import upstream_name
    from s3prl_upstream.superb import PREDICTIONS, PROBLEMS

    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s")
    torch.manual_seed(0)
    folder = out_dir / system.name
    problem = PROBLEMS[task]()
    settings = dict(settings)
    upstream = {"name": settings.pop("filterbank", FILTERBANK)}
    if system.upstream is not None:
        upstream = {"name": upstream_name(system.upstream), "path_or_url": str(system.upstream)}
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
    write_json(folder / "result.json", _result(task, system.name, table) | {"layer_weights": _softmax(layers)})


def _softmax(layers: Any) -> list[float]:
    return layers.softmax(0).tolist() if layers is not None else []


def _result(task: str, name: str, table: Table) -> dict[str, Any]:
    """Return the fields of ``result.json`` that follow from the predictions."""
    right, totals = exact_counts(table)
    result = {"task": task, "system": name, "metric": METRIC, **bootstrap.rate(right, totals).as_dict()}
    result |= {"num_utts": len(totals), "num_examples": len(table)}
    if task == "ic":
        return result | {"slot_accuracy": bootstrap.rate(*slot_counts(table)).as_dict()}
    return result | {"num_classes": len({row["label"] for row in table.values()})}


def slot_counts(predictions: Table) -> Counts:
    """Return how many slots of each utterance are right, and how many there are, in the order of ids, each (U,)."""
    return _by_utterance(predictions, lambda found, label: (sum(map(str.__eq__, found, label)), len(label)))


def exact_counts(predictions: Table) -> Counts:
    """Return how many examples of each utterance are wholly right, which is SUPERB's accuracy, and how many there are.

    Words of one utterance share its speaker and room, so they are drawn together. In the order of ids, each (U,).
    """
    return _by_utterance(predictions, lambda found, label: (int(found == label), 1))


def _by_utterance(predictions: Table, count: Callable[[Any, Any], tuple[int, int]]) -> Counts:
    sums: dict[str, list[int]] = {}
    for name, row in sorted(predictions.items()):
        right, total = count(row["prediction"], row["label"])
        entry = sums.setdefault(utterance_of(name), [0, 0])
        entry[0] += right
        entry[1] += total
    table = np.array(list(sums.values()), dtype=int).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _compare(out_dir: Path, systems: list[System]) -> str:
    """Write the paired differences to ``random`` and, apart, those to ``fbank``, and return the table."""
    results = [read_json(out_dir / system.name / "result.json") for system in systems]
    lines = [f"{'system':<12} {METRIC + ' %':>22} {'examples':>10} {'utterances':>10}"]
    for row in results:
        lines.append(f"{row['system']:<12} {_percent(row):>22} {row['num_examples']:>10} {row['num_utts']:>10}")
        if "slot_accuracy" in row:
            lines[-1] += f"   slots {_percent(row['slot_accuracy'])}"
    tables = {system.name: read_json(out_dir / system.name / "predictions.json") for system in systems}
    comparison: dict[str, Any] = {"metric": METRIC}
    for base, key in (("random", "differences"), ("fbank", "differences_to_fbank")):
        differences = _differences(tables, base)
        if differences and base == "random":
            comparison |= {"against": base}
        if differences:
            comparison[key] = differences
        lines += [f"{METRIC} {name} - {base}, points: {_percent(row)}" for name, row in differences.items()]
    if "pretrained" in comparison.get("differences", {}):
        comparison["difference"] = comparison["differences"]["pretrained"]
    write_json(out_dir / "comparison.json", comparison)
    return "\n".join(lines)


def _differences(tables: dict[str, Table], base: str) -> dict[str, dict[str, float]]:
    """Return the paired difference of each other system to ``base``, none where ``base`` was not run."""
    if base not in tables:
        return {}
    right, totals = exact_counts(tables[base])
    return {
        name: bootstrap.difference(exact_counts(table)[0], right, totals).as_dict()
        for name, table in tables.items()
        if name != base
    }


def _percent(row: dict[str, float]) -> str:
    return f"{100 * row['value']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def progress(log: str) -> str | None:
    """Return the state of a training from the end of S3PRL's progress bars."""
    found = re.findall(r"train: +\d+%[^\n]*?(\d+/\d+) \[([^\]]*)\]", log)
    return f"step {found[-1][0]} [{found[-1][1]}]" if found else None
