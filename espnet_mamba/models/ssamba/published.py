"""The authors' checkpoints: a pickled state dict with their own names, read without executing what a pickle may hold.

Their model is Vision Mamba's (``v.``) inside a module with the two heads, saved through ``DataParallel`` (``module.``).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espnet_mamba.models.ssamba.checkpoints import raise_misfits
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining

PREFIX = "module."
# ours -> theirs, by the beginning of a name; what stands in neither keeps its name (the mixers' parameters do)
RENAMED = {
    "encoder.patch_embedding.": "v.patch_embed.proj.",
    "encoder.class_token": "v.cls_token",
    "encoder.positions": "v.pos_embed",
    "encoder.mask_embedding": "mask_embed",
    "encoder.blocks.": "v.layers.",
    "encoder.final_norm.": "v.norm_f.",
    "classification_head.": "cpredlayer.",
    "reconstruction_head.": "gpredlayer.",
}
UNUSED = ("v.head.weight", "v.head.bias")  # Vision Mamba's 1000 image classes, never trained
SIZES = ("p_input_fdim", "p_input_tdim")  # mel bins and frames of pretraining, kept as parameters
FLAT = {"v.cls_token": 2, "v.pos_embed": 1, "mask_embed": 2}  # leading dimensions of 1 that ours do not have
MASKED_SHARE = 300 / 512  # of the patches; a checkpoint does not tell
# what the published training did and the shapes do not tell
PUBLISHED = {"residual": "doubled", "final_norm": "twice", "dt_bias_backward": "zero"}


def published_name(name: str) -> str:
    """Return the authors' name for one of our parameters, without ``module.``."""
    for ours, theirs in RENAMED.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def load_published(path: str | Path, **overrides: Any) -> SsambaForPretraining:
    """Read a checkpoint of SSAMBA's authors; the sizes are read off its tensors.

    Args:
        path: a ``.pth`` file.
        overrides: fields of the config, e.g. ``residual="single"``; sizes that the tensors do not have are misfits.

    Returns:
        The model with both heads, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that holds more than tensors or is torn; a key that is missing, unknown or of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a checkpoint of SSAMBA's authors (.pth)")
    state = {key.removeprefix(PREFIX): tensor for key, tensor in _read_tensors(path).items()}
    config = dataclasses.replace(_config_of(state, str(path)), **{"name": path.stem} | PUBLISHED | overrides)
    found = {key: _flat(key, tensor) for key, tensor in state.items() if key not in UNUSED + SIZES}
    with torch.random.fork_rng(devices=[]):
        model = SsambaForPretraining(config)
    expected = {published_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    raise_misfits(str(path), {theirs: tensor for theirs, (_, tensor) in expected.items()}, found)
    model.load_state_dict({name: found[theirs] for theirs, (name, _) in expected.items()})
    return model.eval()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or hostile file can fail anywhere in the unpickler, with any error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: refused: not a file of plain tensors; nothing in it was executed ({reason})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: not a state dict (names to tensors)")
    return state


def _config_of(state: dict[str, Tensor], source: str) -> SsambaConfig:
    """Read the sizes off the tensors that tell them."""
    telling = ("v.patch_embed.proj.weight", *SIZES, *(f"v.layers.0.mixer.{n}" for n in ("A_log", "conv1d.weight")))
    missing = [key for key in telling if key not in state]
    if missing:
        raise ValueError(f"{source}: not a checkpoint of SSAMBA's authors: {', '.join(missing)} missing")
    patch, mel_bins, frames, A_log, conv = (state[key] for key in telling)
    if patch.dim() != 4 or A_log.dim() != 2 or conv.dim() != 3:
        shapes = ", ".join(f"{key} is {tuple(state[key].shape)}" for key in telling)
        raise ValueError(f"{source}: {shapes}; expected (D, 1, mel bins, frames), (), (), (E, N), (E, 1, W)")
    num_patches = int(mel_bins) * int(frames) // (patch.shape[2] * patch.shape[3])
    layers = [int(match[1]) for match in (re.match(r"v\.layers\.(\d+)\.", key) for key in state) if match]
    return SsambaConfig(
        name=Path(source).stem,
        embed_dim=patch.shape[0],
        depth=max(layers) + 1,
        state_size=A_log.shape[1],
        conv_kernel=conv.shape[2],
        expand=A_log.shape[0] // patch.shape[0],
        num_mel_bins=int(mel_bins),
        num_frames=int(frames),
        patch_size=tuple(patch.shape[2:]),
        mask_patches=max(1, round(MASKED_SHARE * num_patches)),
    )


def _flat(key: str, tensor: Tensor) -> Tensor:
    """Drop leading dimensions of 1 where ours has none, so that shapes can be compared."""
    for _ in range(FLAT.get(key, 0)):
        tensor = tensor.squeeze(0)
    return tensor
