"""MACs per second of audio, part by part and length by length, as a table: HuBERTs and SSAMBAs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from espnet_mamba.efficiency.macs import FLOP_PER_MAC, macs_per_second
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.ssamba.config import KIND, SsambaConfig
from espnet_mamba.models.ssamba.config import load_config as load_ssamba_config


def open_config(path: str | Path) -> HubertConfig | SsambaConfig:
    """Read a model's YAML of either kind; what its own ``load_config`` raises."""
    path = Path(path)
    values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    is_ssamba = isinstance(values, dict) and values.get("kind") == KIND
    return load_ssamba_config(path) if is_ssamba else load_config(path)


def macs_table(configs: Sequence[HubertConfig | SsambaConfig], seconds: Sequence[float]) -> str:
    """Return a Markdown table in GMAC per second of audio: a row per part of a model, its sum, and the sum as GFLOP.

    Args:
        configs: the models; heads are left out.
        seconds: lengths of the audio.

    Raises:
        ValueError: a length shorter than one frame.
    """
    lines = ["| " + " | ".join(["model", "part", *(f"at {length:g} s" for length in seconds)]) + " |"]
    lines.append("|" + " --- |" * (2 + len(seconds)))
    for config in configs:
        at_lengths = [macs_per_second(config, length) for length in seconds]
        sums = [sum(parts.values()) for parts in at_lengths]
        rows = [(part, [parts[part] for parts in at_lengths]) for part in at_lengths[0]] if at_lengths else []
        rows += [("all, GMAC/s", sums), ("all, GFLOP/s", [FLOP_PER_MAC * value for value in sums])]
        for part, values in rows:
            lines.append("| " + " | ".join([f"`{config.name}`", part, *(f"{v / 1e9:.4g}" for v in values)]) + " |")
    return "\n".join(lines)
