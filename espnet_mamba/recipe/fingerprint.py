"""What a stage depends on, so that it reruns when that changed and only then: its options and its input files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

# Options that choose how fast a result comes, never which.
SPEED_OPTIONS = {"--nj", "--num_workers", "--num_shards", "--ngpu", "--device", "--num_threads", "--resume"}
SPEED_OPTIONS |= {"--launcher"}  # where jobs run
# A resumed run may have another number of processes than before: batches are the same.
SPEED_OPTIONS |= {"--dist_backend", "--multiprocessing_distributed"}

FileState = dict[str, list[int | str]]  # path -> [size, mtime_ns, digest]


def command_options(command: Sequence[str]) -> dict[str, str]:
    """Split a command into its options, in a form that can be compared: ``{"--seed": "0", "program": ...}``.

    The interpreter and options that only change speed are left out.
    """
    words = list(command)
    start = words.index("-m") + 1 if "-m" in words else 0
    options: dict[str, str] = {"program": words[start]}
    key, seen = "", {}
    for word in words[start + 1 :]:
        if word.startswith("--"):
            seen[word] = seen.get(word, 0) + 1
            key = word if seen[word] == 1 else f"{word}#{seen[word]}"
            options[key] = ""
        elif key:
            options[key] = f"{options[key]} {word}".strip()
        else:
            options["program"] += f" {word}"
    return {k: v for k, v in options.items() if k.split("#")[0] not in SPEED_OPTIONS}


def command_configs(command: Sequence[str]) -> list[Path]:
    """Return the YAML files that a command names: their content is an input too."""
    return [Path(word) for word in command if word.endswith(".yaml") and Path(word).is_file()]


def file_states(paths: Sequence[Path], known: Mapping[str, Sequence[int | str]]) -> FileState:
    """Return size, time and digest of each file (of a folder: of each file in it).

    A file whose size and time are those in ``known`` keeps its digest unread, so that a look costs no time.
    """
    states: FileState = {}
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            stat = file.stat()
            old = known.get(str(file))
            same = old is not None and list(old[:2]) == [stat.st_size, stat.st_mtime_ns]
            digest = str(old[2]) if same and old is not None else _digest(file)
            states[str(file)] = [stat.st_size, stat.st_mtime_ns, digest]
    return states


def differences(
    old_options: Mapping[str, str], new_options: Mapping[str, str], old_files: Mapping[str, list], new_files: FileState
) -> list[str]:
    """Return what changed, one readable line each; empty when nothing did."""
    changes = []
    for key in sorted(old_options.keys() | new_options.keys()):
        before, now = old_options.get(key), new_options.get(key)
        if before != now:
            changes.append(f"{key} was {'not given' if before is None else before!r}, now {_now(now)}")
    for path in sorted(old_files.keys() | new_files.keys()):
        if path not in new_files:
            changes.append(f"input {path} is gone")
        elif path not in old_files:
            changes.append(f"input {path} is new")
        elif old_files[path][2] != new_files[path][2]:
            changes.append(f"input {path} changed")
    return changes


def _now(value: str | None) -> str:
    return "not given" if value is None else repr(value)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
