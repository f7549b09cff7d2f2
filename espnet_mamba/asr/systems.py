"""The systems that are compared: ``pretrained``, ``random`` (upstream folders) and ``fbank`` (filterbanks)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NAMES = ("pretrained", "random", "fbank")
FILTERBANKS = ("fbank", "logmel")


@dataclass(frozen=True)
class System:
    """A name and where its features come from."""

    name: str
    upstream: Path | None  # None: filterbanks


def parse_systems(specs: list[str]) -> list[System]:
    """Return the systems of ``NAME=SOURCE`` specifications in the fixed order of names.

    SOURCE is an upstream folder, or ``logmel`` (also called ``fbank``). Raises ValueError for an unknown or repeated
    name and for a folder that is not an upstream, naming the stage that makes it.
    """
    found: dict[str, System] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not equals or not source:
            raise ValueError(f"--system {spec}: write NAME=SOURCE, such as pretrained=exp/upstream or fbank=logmel")
        if name not in NAMES:
            raise ValueError(f"--system {spec}: the name is one of {', '.join(NAMES)}")
        if name in found:
            raise ValueError(f"--system {spec}: {name} is given twice")
        found[name] = System(name, None if source in FILTERBANKS else _upstream(source))
    if not found:
        raise ValueError("no system to train; give at least one --system NAME=SOURCE")
    return [found[name] for name in NAMES if name in found]


def _upstream(source: str) -> Path:
    folder = Path(source).resolve()
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        what = "no such upstream folder" if not folder.is_dir() else f"not an upstream folder, {missing[0]} is missing"
        raise ValueError(f"{source}: {what}; the stage 'upstream' makes it")
    return folder
