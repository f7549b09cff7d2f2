"""A model as data: one frozen dataclass, read from and written to YAML and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from espnet_mamba.names import nearest

BASE_CONV_LAYERS = ((512, 10, 5),) + ((512, 3, 2),) * 4 + ((512, 2, 2),) * 2


@dataclass(frozen=True)
class HubertConfig:
    """Every choice that shapes a HuBERT model. Defaults: HuBERT Base with a Mamba inside (docs/papers.md 1, 4)."""

    name: str = "extbimamba_base"
    front_end: str = "conv_group"  # conv_group: HuBERT's; conv_layer: causal
    conv_layers: tuple[tuple[int, int, int], ...] = BASE_CONV_LAYERS  # (channels, kernel, stride) in samples
    feature_grad_scale: float = 0.1  # fairseq: feature_grad_mult
    embed_dim: int = 768  # D
    num_layers: int = 12
    mixer: str = "extbimamba"  # a key of layers.block.MIXERS
    state_size: int = 24  # N; paper 2 uses 24, Mamba's own default is 16
    conv_kernel: int = 4  # frames of the mixer's causal convolution
    expand: int = 3  # E / D; paper 2 uses 3, Mamba's own default is 2
    join: str = "sum"  # how two directions meet: sum (paper 2's code), concat_linear (paper 1), mean (innbimamba only)
    share_conv: bool = True  # innbimamba: both directions read one convolution (fits paper 2's 82.9 M)
    head_dim: int = 64  # mamba2 only: channels that share a step size
    num_heads: int = 12  # attention only
    attention_dropout: float = 0.1  # attention only
    dt_init: str = "mamba"  # mamba, or bert_reset: the papers' accidental re-initialisation (docs/papers.md 9)
    block: str = "plain"  # plain: mixer, then feed-forward; macaron: the Conformer's, paper 1's ConBiMamba
    ffn_dim: int = 0  # inner width of the feed-forward part; 0: none
    conv_module_kernel: int = 31  # frames of a macaron block's depthwise convolution
    norm: str = "post"  # post (all of paper 2's configs) or pre
    position: str = "conv"  # conv (centred), causal_conv, none
    position_kernel: int = 128  # frames
    position_groups: int = 16
    dropout_input: float = 0.1
    dropout: float = 0.1  # residual branches and the input of the first block
    activation_dropout: float = 0.0  # inside the feed-forward part
    layer_drop: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_layers", tuple(tuple(layer) for layer in self.conv_layers))

    @property
    def downsample_rate(self) -> int:
        """Samples from one frame to the next: 320 for every shipped model."""
        rate = 1
        for _, _, stride in self.conv_layers:
            rate *= stride
        return rate

    @property
    def receptive_field(self) -> int:
        """Samples that one frame of the convolutional front end sees: 400 for every shipped model."""
        width, rate = 1, 1
        for _, kernel, stride in self.conv_layers:
            width, rate = width + (kernel - 1) * rate, rate * stride
        return width


def config_from_dict(values: dict[str, Any], source: str) -> HubertConfig:
    """Build a config; ValueError names ``source``, the unknown key and the nearest known one."""
    known = [field.name for field in fields(HubertConfig)]
    for key in values:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near!r}?" if near else f"; known: {' '.join(known)}"
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    return HubertConfig(**values)


def config_to_dict(config: HubertConfig) -> dict[str, Any]:
    """Return plain values that YAML and JSON can hold."""
    values = asdict(config)
    values["conv_layers"] = [list(layer) for layer in config.conv_layers]
    return values


def load_config(path: str | Path) -> HubertConfig:
    """Read a model's YAML.

    Raises:
        FileNotFoundError: there is no such model; the message names the nearest one in the folder.
        ValueError: an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        models = sorted(p.stem for p in path.parent.glob("*.yaml"))
        near = nearest(path.stem, models)
        hint = f"did you mean {near!r}? " if near else ""
        raise FileNotFoundError(f"model {path.stem!r}: no file {path}; {hint}known: {' '.join(models)}")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return config_from_dict({"name": path.stem} | values, str(path))
