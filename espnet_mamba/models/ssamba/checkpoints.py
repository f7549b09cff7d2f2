"""An SSAMBA model as a folder that can be shared: config.json, model.safetensors, README.md; no pickle among them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from espnet_mamba.data.files import read_json, write_json, write_text
from espnet_mamba.models.ssamba.config import config_from_dict, config_to_dict
from espnet_mamba.models.ssamba.model import SsambaModel

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = "espnet-mamba SsambaModel"
SHOWN = 8  # misfits named in a message


def save_checkpoint(model: SsambaModel, folder: str | Path, card: str | None = None) -> None:
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
    write_text(temporary / CARD, card or f"# {model.config.name}\n\nAn SSAMBA model of espnet-mamba.\n")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def load_checkpoint(folder: str | Path) -> SsambaModel:
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
    model = SsambaModel(config_from_dict(values, str(folder / CONFIG)))
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS}: not readable ({error}); export it again") from error
    raise_misfits(str(folder), model.state_dict(), tensors)
    model.load_state_dict(tensors)
    return model.eval()


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
