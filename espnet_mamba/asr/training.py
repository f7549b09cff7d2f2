"""Trains the recognisers of all systems with ESPnet, each in a process and a folder of its own."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from espnet_mamba.asr.jobs import Job, run_jobs
from espnet_mamba.asr.preparation import digests, read_set, system_config, write_lists, write_yaml
from espnet_mamba.asr.systems import System
from espnet_mamba.asr.tokens import make_tokens
from espnet_mamba.data.files import read_json, write_json

MARKER = "done.json"  # written last: the training of this folder is complete
INPUTS = "inputs.json"  # what the training in this folder was started with


def train_systems(
    config: Path,
    dump_dir: Path,
    train_set: str,
    valid_set: str,
    out_dir: Path,
    systems: list[System],
    nbpe: int,
    options: dict[str, Any],
    nj: int,
) -> None:
    """Make tokens and data lists in ``out_dir``, then train each system in ``out_dir/<system>``.

    A finished system is left alone, an interrupted one resumes from its last epoch, one whose inputs changed starts
    again. ``options`` are ESPnet's and override the file ``config``. Raises ValueError for an option that ESPnet does
    not know, and with the end of its log when a training fails.
    """
    train = read_set(dump_dir, train_set)
    write_lists(train, out_dir / "data" / "train")
    write_lists(read_set(dump_dir, valid_set), out_dir / "data" / "valid")
    count = make_tokens([utt.text for utt in train], nbpe, out_dir / "tokens")
    hours = sum(utt.num_samples for utt in train) / 16000 / 3600
    print(f"training on {len(train)} utterances, {60 * hours:.1f} min, {count} tokens", flush=True)
    pending = {}
    for system in systems:
        settings = system_config(config, system, out_dir, options)
        inputs = {"options": settings, "files": digests(system, out_dir)}
        if is_done(out_dir / system.name, inputs):
            print(f"asr {system.name}: already trained", flush=True)
        else:
            pending[system.name] = inputs
    if not pending:
        return
    for inputs in pending.values():
        _check_options(inputs["options"])
    jobs = []
    for name, inputs in pending.items():
        prepare_folder(out_dir / name, inputs)
        jobs.append(Job(f"asr {name}", train_one, out_dir / name / "train.log", (out_dir / name,)))
    run_jobs(jobs, nj, progress, use_gpu=bool(options.get("ngpu", 0)))


def is_done(folder: Path, inputs: dict[str, Any]) -> bool:
    """Return whether the training in ``folder`` is complete and nothing that it depends on has changed."""
    if not (folder / MARKER).is_file() or _changes(read_json(folder / INPUTS), inputs):
        return False
    return read_json(folder / MARKER)["max_epoch"] >= inputs["options"].get("max_epoch", 0)


def prepare_folder(folder: Path, inputs: dict[str, Any]) -> None:
    """Write what the training in ``folder`` starts from, after removing what cannot be resumed and saying why."""
    reasons = _changes(read_json(folder / INPUTS), inputs) if (folder / INPUTS).is_file() else []
    checkpoint = folder / "checkpoint.pth"
    if checkpoint.is_file() and not zipfile.is_zipfile(checkpoint):
        reasons.append(f"{checkpoint.name}, cut off while it was written,")
    if reasons:
        print(f"asr {folder.name}: {', '.join(reasons)} changed: training starts again", flush=True)
        shutil.rmtree(folder)
    write_json(folder / INPUTS, inputs)
    write_yaml(folder / "train.yaml", inputs["options"])


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Name what differs and matters; training for more epochs goes on from the last one."""
    names = []
    for part in ("options", "files"):
        keys = sorted(old[part].keys() | new[part].keys())
        names += [key for key in keys if old[part].get(key) != new[part].get(key) and key != "max_epoch"]
    return names


def _check_options(settings: dict[str, Any]) -> None:
    """Raise ValueError for an option that ESPnet lacks; the imports are then shared by the processes forked later."""
    from espnet_mamba.asr.task import ASRTask
    from s3prl_upstream import preload

    preload()
    known = {action.dest for action in ASRTask.get_parser()._actions}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ValueError(f"{unknown[0]}: not an option of ESPnet's ASR task; see its --help, or mend the configuration")


def train_one(folder: Path) -> None:
    """Run ESPnet's training for the options in ``folder/train.yaml`` and mark the folder as done."""
    from espnet_mamba.asr.preparation import read_yaml
    from espnet_mamba.asr.task import ASRTask

    ASRTask.main(cmd=["--config", str(folder / "train.yaml")])
    write_json(folder / MARKER, {"max_epoch": read_yaml(folder / "config.yaml")["max_epoch"]})


def progress(log: str) -> str | None:
    """Return the state of a training from the end of ESPnet's log: epoch, losses of the last one, time left."""
    started = re.findall(r"(\d+)/(\d+)epoch started\.?(?: Estimated time to finish: ([^\n]*))?", log)
    if not started:
        return None
    epoch, epochs, left = started[-1]
    results = re.findall(r"epoch results: [^\n]*?\[valid\][^\n]*?\bacc=([\d.]+)[^\n]*?\bloss=([\d.]+)", log)
    text = f"epoch {epoch}/{epochs}"
    if results:
        text += f", validation loss {float(results[-1][1]):.1f}, token accuracy {float(results[-1][0]):.2f}"
    return text + (f", {left} left" if left else "")
