"""What a user would pick instead, as entries beside our models: random weights, the settings of HuBERT or Mamba Base.

Each needs a package of its own and is skipped with a reason where that is missing. ESPnet's encoders are added by
``espnet_mamba.asr.peer_encoders``, since this room does not know ESPnet.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from espnet_mamba.efficiency.entries import Entry, entry_of_config
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.hubert import HubertModel


class Peer(NamedTuple):
    """A line of the table of peers."""

    what: str
    build: Callable[[], nn.Module]
    twin: str | None  # the model here whose sizes, and so MACs, are the same
    package: str
    needs_cuda: bool = False
    attends: bool = True


class HfHubert(nn.Module):
    """Hugging Face's ``HubertModel``, Base, with one of its ways of attention: ``sdpa`` (fused) or ``eager``."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        from transformers import HubertConfig as HfConfig
        from transformers import HubertModel as HfModel

        config = HfConfig(attn_implementation=attention, layerdrop=0.0, apply_spec_augment=False)
        self.model = HfModel(config)

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return all hidden states; every row of ``wavs`` must be full."""
        states = list(self.model(wavs, output_hidden_states=True).hidden_states)
        return states, torch.full((len(wavs),), states[-1].shape[1])


class TorchaudioHubert(nn.Module):
    """torchaudio's ``hubert_base``."""

    def __init__(self) -> None:
        super().__init__()
        import torchaudio

        self.model = torchaudio.models.hubert_base(encoder_layer_drop=0.0)

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the states after each block; every row of ``wavs`` must be full."""
        states, _ = self.model.extract_features(wavs)
        return states, torch.full((len(wavs),), states[-1].shape[1])


class ForeignMixer(nn.Module):
    """Someone else's Mamba layer where ours stands; it knows no lengths and no chunks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: Any = None) -> tuple[Tensor, None]:
        """Mix ``x (B, T, D)``, unpadded."""
        return self.layer(x), None


def with_mixers(config: HubertConfig, layer: Callable[[int], nn.Module]) -> HubertModel:
    """Return a model of ``config`` whose block i mixes by ``layer(i)``."""
    model = entry_of_config(config).build()
    for index, block in enumerate(model.blocks):
        block.mixer = ForeignMixer(layer(index))
    return model


def slow_mamba(config: HubertConfig) -> HubertModel:
    """Return a causal Mamba with transformers' ``MambaMixer``, without compiled kernels: a Python loop over frames."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    sizes = MambaConfig(
        hidden_size=config.embed_dim,
        state_size=config.state_size,
        expand=config.expand,
        conv_kernel=config.conv_kernel,
        num_hidden_layers=config.num_layers,
    )
    return with_mixers(config, lambda index: MambaMixer(sizes, index))


def mamba_ssm(config: HubertConfig) -> HubertModel:
    """Return a causal Mamba with mamba-ssm's layer and kernels (CUDA only)."""
    from mamba_ssm import Mamba

    sizes = {"d_state": config.state_size, "d_conv": config.conv_kernel, "expand": config.expand}
    return with_mixers(config, lambda _: Mamba(config.embed_dim, **sizes))


def own_peers(models_dir: Path) -> dict[str, Peer]:
    """Return name -> peer of those that need no ESPnet; ``models_dir`` holds the YAMLs of their twins."""

    def mamba_base() -> HubertConfig:
        return load_config(models_dir / "mamba_base.yaml")

    return {
        "hf_hubert_base": Peer(
            "Hugging Face's HuBERT Base, fused attention", lambda: HfHubert("sdpa"), "transformer_base", "transformers"
        ),
        "hf_hubert_base:eager": Peer(
            "Hugging Face's HuBERT Base, eager attention", lambda: HfHubert("eager"), "transformer_base", "transformers"
        ),
        "torchaudio_hubert_base": Peer("torchaudio's HuBERT Base", TorchaudioHubert, "transformer_base", "torchaudio"),
        "mamba_base:transformers": Peer(
            "mamba_base with transformers' Mamba layer, slow path",
            lambda: slow_mamba(mamba_base()),
            "mamba_base",
            "transformers",
            attends=False,
        ),
        "mamba_base:mamba_ssm": Peer(
            "mamba_base with mamba-ssm's layer", lambda: mamba_ssm(mamba_base()), "mamba_base", "mamba_ssm", True, False
        ),
    }


def refusal(name: str, peer: Peer, device: str) -> str | None:
    """Return why a peer cannot run here, with the remedy, or None when it can."""
    if importlib.util.find_spec(peer.package) is None:
        return f"{name}: skipped; {peer.package} is not installed (pip install {peer.package.replace('_', '-')})"
    if peer.needs_cuda and not device.startswith("cuda"):
        return f"{name}: skipped; {peer.package} runs on CUDA only, and the device is {device}"
    return None


def peer_entry(name: str, peer: Peer, models_dir: Path) -> Entry:
    """Return a peer as an entry; one with a twin has its formula of MACs."""
    config = load_config(models_dir / f"{peer.twin}.yaml") if peer.twin else None
    return Entry(name, peer.build, config, attends=peer.attends, is_peer=True)
