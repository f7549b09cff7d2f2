"""A model as a folder that can be shared: config.json, model.safetensors, README.md. No pickle is read or written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from espnet_mamba.data.files import read_json, write_json, write_text

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
SHOWN = 8  # misfits named in a message


def write_folder(folder: str | Path, values: dict[str, Any], state: dict[str, Tensor], card: str) -> None:
    """Write a folder: whole under a temporary name first, then renamed over what was there.

    Args:
        folder: what stands there is replaced.
        values: of config.json, with its ``format``.
        state: the weights by name.
        card: the model card, Markdown.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / CONFIG, values)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    with open(temporary / WEIGHTS, "rb") as handle:
        os.fsync(handle.fileno())
    write_text(temporary / CARD, card)
    replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():  # a folder cannot be renamed over one: set aside, so that no kill finds it half deleted
        os.replace(folder, replaced)
    os.replace(temporary, folder)
    shutil.rmtree(replaced, ignore_errors=True)


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Return config.json without its ``format``, which must be ``kind``.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: another format.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no model folder ({name} is missing); stage 7 (upstream) of a recipe writes one"
            )
    values = read_json(folder / CONFIG)
    if values.pop("format", None) != kind:
        raise ValueError(f"{folder / CONFIG}: not a config of {kind!r}; this folder holds another kind of model")
    return values


def read_weights(folder: str | Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights, whose names and shapes must be those of ``expected``.

    Raises:
        ValueError: the file is not readable, or weights do not fit (misfits are named).
    """
    path = Path(folder) / WEIGHTS
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not readable ({error}); export it again") from error
    raise_misfits(str(folder), expected, tensors)
    return tensors


def raise_misfits(source: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: names ``source`` and each key that is missing, unknown or of another shape, with both shapes.
    """
    problems = [f"missing {name} {tuple(expected[name].shape)}" for name in expected if name not in found]
    problems += [f"unknown {name} {tuple(found[name].shape)}" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:SHOWN])
        raise ValueError(f"{source}: weights do not fit the config: {shown} ({len(problems)} in all)")
