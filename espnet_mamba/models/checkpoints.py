"""A model as a folder that can be shared: config.json, model.safetensors, README.md. No pickle is read or written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from espnet_mamba.data.files import read_json, write_json, write_text
from espnet_mamba.models.config import config_from_dict, config_to_dict
from espnet_mamba.models.hubert import HubertModel

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "espnet-mamba HubertModel"


def save_checkpoint(model: HubertModel, folder: str | Path, card: str | None = None) -> None:
    """Write ``model`` as a folder: whole under a temporary name first, then renamed over what was there."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_json(temporary / CONFIG, {"format": FORMAT} | config_to_dict(model.config))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
    with open(temporary / WEIGHTS, "rb") as handle:
        os.fsync(handle.fileno())
    write_text(temporary / CARD, card or f"# {model.config.name}\n\nA model of espnet-mamba.\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load_checkpoint(folder: str | Path) -> HubertModel:
    """Read a model folder; the model comes back in eval mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: another format, another architecture, or weights that do not fit (all misfits are named).
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: no model folder ({name} is missing); stage 7 (upstream) of a recipe writes one"
            )
    values = read_json(folder / CONFIG)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{folder / CONFIG}: not a config of {FORMAT!r}; this folder holds another kind of model")
    model = HubertModel(config_from_dict(values, str(folder / CONFIG)))
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not readable ({error}); export it again") from error
    expected = model.state_dict()
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unknown {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise ValueError(f"{folder}: weights do not fit the config: {'; '.join(problems[:8])} ({len(problems)} in all)")
    model.load_state_dict(tensors)
    return model.eval()
