"""A HuBERT model as a folder that can be shared (``model_folder``)."""

from __future__ import annotations

from pathlib import Path

from espnet_mamba.models.config import config_from_dict, config_to_dict
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.model_folder import CARD, CONFIG, WEIGHTS, read_config, read_weights, write_folder

__all__ = ["CARD", "CONFIG", "FORMAT", "WEIGHTS", "load_checkpoint", "save_checkpoint"]
FORMAT = "espnet-mamba HubertModel"


def save_checkpoint(model: HubertModel, folder: str | Path, card: str | None = None) -> None:
    """Write ``model`` as a folder: whole under a temporary name first, then renamed over what was there."""
    card = card or f"# {model.config.name}\n\nA model of espnet-mamba.\n"
    write_folder(folder, {"format": FORMAT} | config_to_dict(model.config), model.state_dict(), card)


def load_checkpoint(folder: str | Path) -> HubertModel:
    """Read a model folder; the model comes back in eval mode.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: another format, another architecture, or weights that do not fit (misfits are named).
    """
    model = HubertModel(config_from_dict(read_config(folder, FORMAT), str(Path(folder) / CONFIG)))
    model.load_state_dict(read_weights(folder, model.state_dict()))
    return model.eval()
