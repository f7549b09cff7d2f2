"""What is measured: models by configuration or folder, with another way of attention where one is asked for.

Every entry builds a module whose ``extract_features(wavs (B, S), num_samples (B,))`` gives layers and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from espnet_mamba.efficiency.macs import macs_per_second, shortest_samples
from espnet_mamba.layers.attention import CausalSelfAttention, SelfAttention
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.folders import load_model
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.names import nearest

ATTENTION = {
    "eager": "scores and weights kept as tensors: PyTorch's plain form, in place of the fused kernel",
    "mask_per_call": "eager, with the causal mask made row by row on the CPU in every pass, as the papers' code does",
}


@dataclass(frozen=True)
class Entry:
    """A model to measure."""

    name: str
    build: Callable[[], nn.Module]
    config: HubertConfig | SsambaConfig | None = None  # whose MACs by formula are its own; None: not known
    shortest_samples: int = 400
    attends: bool = False  # whether its work grows with the square of the length
    same_weights_as: str | None = None  # an entry of which this is another way to compute the same
    is_peer: bool = False  # somebody else's

    def macs_per_second(self, seconds: float) -> dict[str, float]:
        """Return part -> MACs per second of audio at a length; empty when there is no formula."""
        return {} if self.config is None else macs_per_second(self.config, seconds)


class EagerAttention(nn.Module):
    """A model with PyTorch's plain attention; ``mask_per_call`` also makes the causal mask as the papers' code does."""

    def __init__(self, model: HubertModel, mask_per_call: bool = False) -> None:
        super().__init__()
        self.model = model
        self.mask: Tensor | None = None
        if mask_per_call:
            layers = [module for module in model.modules() if isinstance(module, CausalSelfAttention)]
            for layer in layers:
                layer._mask = self._mask

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """As the model's own."""
        self.mask = None
        with sdpa_kernel(SDPBackend.MATH):
            return self.model.extract_features(wavs, num_samples)

    def _mask(self, queries: Tensor, keys: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the mask of this pass: the first block makes it, the others read it."""
        if self.mask is None:
            frames = keys.shape[2]
            future = torch.zeros(frames, frames)  # float32 and written row by row: the cost is what is measured
            for row in range(frames):
                future[row, row + 1 :] = 1.0
            self.mask = ~future.to(keys.device).bool()
        return self.mask


def open_entries(
    folders: Sequence[str], words: Sequence[str], models_dir: Path, peers: dict[str, Entry]
) -> list[Entry]:
    """Return the entries of model folders (their own weights) and of words (random ones; the cost is the same).

    Args:
        folders: model folders of either kind.
        words: a name of ``models_dir``, a YAML, or a name of ``peers``; with ``:eager`` or ``:mask_per_call`` for
            another way of attention.
        models_dir: folder of YAMLs.
        peers: name -> entry of others' models, of which only those that can run.

    Raises:
        ValueError: a name twice, an unknown way of attention, none at all.
        FileNotFoundError: no such model; the nearest is named.
    """
    entries = [_of_folder(folder) for folder in folders] + [_of_word(word, models_dir, peers) for word in words]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"two models are called {entry.name!r}; give each model once")
        seen.add(entry.name)
    if not entries:
        raise ValueError("no model to measure; give --upstream FOLDER or --models NAME, such as --models mamba_base")
    return entries


def _of_folder(folder: str) -> Entry:
    config = load_model(folder).config
    attends = isinstance(config, HubertConfig) and "attention" in config.mixer
    return Entry(
        config.name, lambda: _without_layer_drop(load_model(folder)), config, shortest_samples(config), attends
    )


def _of_word(word: str, models_dir: Path, peers: dict[str, Entry]) -> Entry:
    if word in peers:
        return peers[word]
    path, _, attention = word.partition(":")
    is_file = path.endswith((".yaml", ".yml"))
    near = None if is_file or (models_dir / f"{path}.yaml").is_file() else nearest(word, peers)
    if near is not None:
        raise ValueError(f"model {word!r}: neither in {models_dir} nor a peer; did you mean {near!r}?")
    config = load_config(path if is_file else models_dir / f"{path}.yaml")
    return entry_of_config(config, attention)


def entry_of_config(config: HubertConfig, attention: str = "") -> Entry:
    """Return the entry of a configuration with random weights; ValueError for an unknown way of attention."""
    attends = "attention" in config.mixer
    common = {"config": config, "shortest_samples": shortest_samples(config), "attends": attends}
    if not attention:
        return Entry(config.name, lambda: _build(config), **common)
    if attention not in ATTENTION:
        raise ValueError(f"{config.name}:{attention}: {attention!r} is not one of: {' '.join(ATTENTION)}")
    wanted = CausalSelfAttention if attention == "mask_per_call" else SelfAttention
    if not attends or (wanted is CausalSelfAttention and config.mixer != "causal_attention"):
        raise ValueError(
            f"{config.name}:{attention}: mixer {config.mixer!r} has no such attention; leave :{attention} out"
        )
    name = f"{config.name}:{attention}"
    return Entry(
        name,
        lambda: EagerAttention(_build(config), attention == "mask_per_call"),
        **common,
        same_weights_as=config.name,
    )


def _build(config: HubertConfig) -> HubertModel:
    return HubertModel(replace(config, layer_drop=0.0))


def _without_layer_drop(model: nn.Module) -> nn.Module:
    """Every call in training shall do the same work."""
    if isinstance(model, HubertModel):
        model.config = replace(model.config, layer_drop=0.0)
    return model
