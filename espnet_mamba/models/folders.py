"""Model folders of either kind, told apart by ``config.json``: who reads one, and what S3PRL calls it.

HuBERTs come out at 50 Hz; SSAMBA, whose own frames are 160 ms, is brought there, since alignments, k-means and the
recogniser want that rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from espnet_mamba.data.files import read_json
from espnet_mamba.models import checkpoints, export
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba import checkpoints as ssamba_checkpoints
from espnet_mamba.models.ssamba import export as ssamba_export
from espnet_mamba.models.ssamba.frames import HOP, SsambaFrames
from espnet_mamba.models.ssamba.model import SsambaModel

UPSTREAMS = {checkpoints.FORMAT: "mamba_hubert", ssamba_checkpoints.FORMAT: "ssamba_50hz"}


@dataclass(frozen=True)
class LayerModel:
    """A model whose ``extract_features(wavs (B, S), num_samples (B,))`` gives layers ``(B, T, D)`` and lengths."""

    model: nn.Module
    num_layers: int  # that it gives, the input of the first block among them
    width: int  # D
    hop: int  # samples from frame to frame


def upstream_name(folder: str | Path) -> str:
    """Return the name under which S3PRL gives a folder's layers at 50 Hz.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: the config of something else.
    """
    return UPSTREAMS[_format_of(folder)]


def load_model(folder: str | Path) -> HubertModel | SsambaModel:
    """Read a model folder of either kind; in eval mode.

    Raises:
        FileNotFoundError, ValueError: see ``load_checkpoint`` of each.
    """
    if _format_of(folder) == ssamba_checkpoints.FORMAT:
        return ssamba_checkpoints.load_checkpoint(folder)
    return checkpoints.load_checkpoint(folder)


def load_layers(folder: str | Path) -> LayerModel:
    """Read a model folder of either kind as a source of layers; in eval mode.

    Raises:
        FileNotFoundError, ValueError: see ``load_checkpoint`` of each.
    """
    model = load_model(folder)
    config = model.config
    if isinstance(model, SsambaModel):
        return LayerModel(SsambaFrames(model).eval(), config.depth // 2 + 1, config.embed_dim, HOP)
    return LayerModel(model, config.num_layers + 1, config.embed_dim, config.downsample_rate)


def export_upstream(model_dir: Path, out_dir: Path, random_dir: Path | None, seed: int) -> HubertModel | SsambaModel:
    """Write an upstream of the kind that ``model_dir`` holds, and its random control; see each kind's ``export``."""
    module = ssamba_export if _format_of(model_dir) == ssamba_checkpoints.FORMAT else export
    return module.export_upstream(model_dir, out_dir, random_dir, seed)


def _format_of(folder: str | Path) -> str:
    path = Path(folder) / checkpoints.CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: no model folder ({checkpoints.CONFIG} is missing); stage 7 (upstream) of a recipe writes one"
        )
    found = read_json(path)
    found = found.get("format") if isinstance(found, dict) else None
    if found not in UPSTREAMS:
        known = " or ".join(repr(name) for name in UPSTREAMS)
        raise ValueError(f"{path}: not a config of {known}; this folder holds another kind of model")
    return found
