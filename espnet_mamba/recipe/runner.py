"""Run one stage of a recipe, or skip it because it is done, and say which and why.

Each stage leaves a record ``NN_name.json`` (options, input digests, time, memory), its log ``NN_name.log``, and
``NN_name.sh``, the command that reruns exactly it.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from espnet_mamba.data.files import read_json, write_json, write_text
from espnet_mamba.recipe.fingerprint import command_configs, command_options, differences, file_states
from espnet_mamba.recipe.process import exclusive, run_logged
from espnet_mamba.recipe.slurm import refuse_running
from espnet_mamba.recipe.table import Stage, maker_of


class StageFailedError(RuntimeError):
    """A stage's command ended with an error."""


def run_stage(
    table: Sequence[Stage],
    stage: Stage,
    variables: Mapping[str, str],
    record_dir: Path,
    command: Sequence[str],
    launcher: Sequence[str] = (),
) -> bool:
    """Run ``stage`` by ``command`` unless it is done with the same options and inputs.

    ``launcher`` is what brings the command to where it runs: words of ``bin/run_job.py`` without log and command.

    Returns:
        True when it ran, False when it was skipped.

    Raises:
        FileNotFoundError: an input is missing; names the stage that makes it.
        ValueError: another process is running this stage, or a Slurm job that nobody waits for.
        StageFailedError: the command failed, or did not make what it should.
    """
    title = f"stage {stage.number} ({stage.name})"
    record_path = record_dir / f"{stage.number:02d}_{stage.name}.json"
    with exclusive(record_path.with_suffix(".lock"), title):
        old = read_json(record_path) if record_path.is_file() else None
        outputs = stage.expand(stage.makes, variables)
        inputs = _inputs(table, stage, variables) + command_configs(command)
        files = file_states(inputs, old["inputs"] if old else {})
        options = command_options(command)
        changes = differences(old["options"], options, old["inputs"], files) if old else []
        missing = [path for path in outputs if not path.exists()]
        if old and old["status"] == "done" and not changes and not missing:
            print(f"{title}: done in {old['seconds']:.0f} s on {old['started']}; skipped", flush=True)
            return False
        _announce(title, stage, old, changes, missing)
        if changes or not launcher:
            refuse_running(record_path.with_suffix(".job.log"), stage.name)
        if changes and stage.work_dir:
            _set_aside(stage.expand([stage.work_dir], variables)[0])
        if launcher:
            command = [*launcher, *_job_options(stage, outputs), str(record_path.with_suffix(".job.log")), *command]
        _execute(title, stage, record_path, command, {"options": options, "inputs": files}, outputs, not launcher)
        return True


def _job_options(stage: Stage, outputs: list[Path]) -> list[str]:
    """Return what ``bin/run_job.py`` must know of a stage: its name, and whether and till when it can be resumed."""
    done = [word for path in outputs for word in ("--done", str(path))]
    return ["--name", stage.name, *(["--resumable", *done] if stage.work_dir else [])]


def _execute(
    title: str,
    stage: Stage,
    record_path: Path,
    command: Sequence[str],
    state: dict[str, dict],
    outputs: list[Path],
    here: bool,
) -> None:
    """Run the command, with a record that says ``running`` until it says ``done`` or ``failed``.

    Memory is measured of a command that runs ``here``, on this machine.
    """
    log = record_path.with_suffix(".log")
    record = {"number": stage.number, "name": stage.name, "purpose": stage.purpose, "command": shlex.join(command)}
    record |= state | {"started": datetime.now().isoformat(timespec="seconds"), "seconds": 0.0, "peak_memory_mb": 0.0}
    write_json(record_path, record | {"status": "running"})
    _write_rerun(record_path.with_suffix(".sh"), command)
    started = time.monotonic()
    status, peak = run_logged(command, log)
    missing = [path for path in outputs if not path.exists()]
    record |= {"seconds": round(time.monotonic() - started, 2), "peak_memory_mb": round(peak) if here else None}
    failed = status != 0 or bool(missing)
    write_json(record_path, record | {"status": "failed" if failed else "done"})
    if failed:
        why = f"exit status {status}" if status else f"it did not make {missing[0]}"
        alone = record_path.with_suffix(".sh")
        raise StageFailedError(f"{title} failed: {why}; log: {log}; run it alone: bash {alone}")
    memory = f", peak memory {peak:.0f} MB" if here else ""
    print(f"{title}: finished in {record['seconds']:.0f} s{memory}", flush=True)


def _inputs(table: Sequence[Stage], stage: Stage, variables: Mapping[str, str]) -> list[Path]:
    paths = stage.expand(stage.needs, variables)
    for need, path in zip(stage.applying(stage.needs, variables), paths, strict=True):
        if not path.exists():
            maker = maker_of(table, need)
            by = f"; stage {maker.number} ({maker.name}) makes it: ./run.sh --stage {maker.name}" if maker else ""
            raise FileNotFoundError(f"stage {stage.number} ({stage.name}) needs {path}, which is missing{by}")
    return paths


def _announce(title: str, stage: Stage, old: dict | None, changes: list[str], missing: list[Path]) -> None:
    if old is None:
        why = stage.purpose
    elif changes:
        shown = "; ".join(changes[:4]) + (f"; and {len(changes) - 4} more" if len(changes) > 4 else "")
        why = f"runs again, since {shown}"
    elif old["status"] != "done":
        why = f"resumes: the run of {old['started']} did not finish" if stage.work_dir else "starts over"
    else:
        why = f"runs again, since {missing[0]} is missing"
    print(f"{title}: {why}", flush=True)


def _set_aside(folder: Path) -> None:
    """Rename the folder of a run whose options or inputs changed: it must not be resumed, nor lost."""
    if folder.exists():
        kept = folder.with_name(f"{folder.name}.before_{datetime.now():%Y%m%d_%H%M%S}")
        os.replace(folder, kept)
        print(f"  {folder} was made otherwise; kept as {kept.name}", flush=True)


def _write_rerun(path: Path, command: Sequence[str]) -> None:
    """Write a script that repeats the command in this folder with the variables that shape it."""
    names = ("PYTHONPATH", "OMP_NUM_THREADS", "NLTK_DATA", "PATH")
    exports = "".join(f"export {name}={shlex.quote(os.environ[name])}\n" for name in names if name in os.environ)
    write_text(path, f"#!/usr/bin/env bash\ncd {shlex.quote(os.getcwd())} || exit 1\n{exports}{shlex.join(command)}\n")
