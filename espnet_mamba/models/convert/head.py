"""The pretraining head of a converted checkpoint, beside its model: ``pretraining_head.safetensors``."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from espnet_mamba.models.pretraining import CosineHead

HEAD = "pretraining_head.safetensors"
PARTS = {"projection.weight", "projection.bias", "classes"}


def head_fits(tensors: dict[str, Tensor], embed_dim: int) -> bool:
    """Tell whether tensors make one whole ``CosineHead``: a single label set, all three parts."""
    if set(tensors) != PARTS or tensors["classes"].ndim != 2:
        return False
    inner = tensors["classes"].shape[1]
    return tensors["projection.weight"].shape == (inner, embed_dim) and tensors["projection.bias"].shape == (inner,)


def save_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a head into a model folder."""
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, folder / HEAD)


def load_head(folder: str | Path) -> CosineHead | None:
    """Read the head of a converted checkpoint, or None if it came without.

    fairseq's class embeddings begin with its dictionary's 4 special symbols: class k of the labels is row k + 4.
    """
    path = Path(folder) / HEAD
    if not path.is_file():
        return None
    tensors = load_file(path)
    inner, width = tensors["projection.weight"].shape
    head = CosineHead(width, len(tensors["classes"]), inner)
    head.load_state_dict(tensors)
    return head
