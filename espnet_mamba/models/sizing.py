"""What a model holds, by formula from its config alone: parameters by part, streaming state, receptive field.

Parts bear the names that efficiency.macs gives them, so that both can stand in one table.
Letters: D width, C channels of the front end, E = expand * D, N states, R rank of dt, W kernel of the mixer's
convolution, F inner width of the feed-forward part, K classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from espnet_mamba.layers.block import MIXERS
from espnet_mamba.layers.conv_frontend import NORMS
from espnet_mamba.layers.positions import POSITIONS
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import SAMPLE_RATE, HubertModel
from espnet_mamba.models.pretraining import HEAD_DIM
from espnet_mamba.names import nearest

BLOCKS = ("plain", "macaron")
SCAN_BYTES = 4  # the scan's state is float32 whatever the model's type


def count_parameters(config: HubertConfig, num_classes: int = 0) -> dict[str, int]:
    """Return part -> number of parameters by formula; the pretraining head only with ``num_classes``.

    Raises:
        ValueError: sizes that no model can have, or an unknown mixer or block; one line.
    """
    check_sizes(config)
    if num_classes < 0:
        raise ValueError(f"num_classes: {num_classes} is below 0")
    width, channels = config.embed_dim, config.conv_layers[-1][0]
    parts = {"front_end": _front_end(config), "projection": _linear(channels, width), "mask_embedding": width}
    if config.position != "none":  # weight norm: one length per tap beside the direction
        kernel = config.position_kernel
        parts["position"] = kernel + width * (width // config.position_groups) * kernel + width
    mixer = dict(MIXER_PARAMETERS[config.mixer](config))
    mixer_norm = mixer.pop("norms", 0)
    parts |= {name: config.num_layers * count for name, count in mixer.items()}
    macaron = config.block == "macaron"
    if config.ffn_dim:
        ffn = _linear(width, config.ffn_dim) + _linear(config.ffn_dim, width)
        parts["feed_forward"] = config.num_layers * (2 if macaron else 1) * ffn
    if macaron:
        depthwise_and_norm = width * (config.conv_module_kernel + 1) + 2 * width
        pointwise = _linear(width, 2 * width) + _linear(width, width)
        parts["conv_module"] = config.num_layers * (pointwise + depthwise_and_norm)
    norms = 5 if macaron else 2 if config.ffn_dim else 1
    outside = 2 * channels + (2 * width if config.norm == "post" else 0)
    parts["norms"] = outside + config.num_layers * (norms * 2 * width + mixer_norm)
    if num_classes:
        parts["head"] = _linear(width, HEAD_DIM) + num_classes * HEAD_DIM
    return parts


def counted_parameters(model: nn.Module) -> dict[str, int]:
    """Return part -> number of parameters of a built ``HubertModel`` or ``HubertForPretraining``, by their names.

    ValueError: a parameter that belongs to no part.
    """
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        parts[_part_of(name)] += parameter.numel()
    return dict(parts)


def look_ahead(config: HubertConfig) -> tuple[float, str]:
    """Return what a model says of its own look-ahead: ms, infinite for the whole utterance, and the same in words."""
    check_sizes(config)
    with torch.device("meta"):
        model = HubertModel(replace(config, num_layers=1))  # blocks are alike
    return model.look_ahead_ms, model.look_ahead


def check_sizes(config: HubertConfig) -> None:
    """Raise ValueError, in one line, for the first name or size that cannot be."""
    for field, known in _NAMES.items():
        value = getattr(config, field)
        if value not in known:
            near = nearest(str(value), known)
            hint = f"; did you mean {near!r}?" if near else ""
            raise ValueError(f"{field}: {value!r} is not one of: {' '.join(known)}{hint}")
    sizes = ["embed_dim", "num_layers"]
    sizes += [name for name in MIXERS[config.mixer].options if type(getattr(HubertConfig, name)) is int]
    sizes += ["position_kernel", "position_groups"] if config.position != "none" else []
    sizes += ["ffn_dim", "conv_module_kernel"] if config.block == "macaron" else []
    for name in [*sizes, "ffn_dim"]:
        value, least = getattr(config, name), 1 if name in sizes else 0
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: {value!r} is not a whole number of at least {least}")
    for name, step in _width_steps(config).items():
        if config.embed_dim % step:
            value, widths = getattr(config, name), f"widths are multiples of {width_step(config)}"
            raise ValueError(f"{name}: {value} does not divide the width, {config.embed_dim}; {widths}")


def width_step(config: HubertConfig) -> int:
    """Return what the width must be a multiple of: attention's heads, position groups, Mamba-2's head size."""
    return math.lcm(*_width_steps(config).values())


_NAMES = {"mixer": MIXERS, "block": BLOCKS, "front_end": NORMS, "position": POSITIONS, "norm": ("post", "pre")}


def _width_steps(config: HubertConfig) -> dict[str, int]:
    """Return field -> what must divide the width for its sake."""
    steps = {} if config.position == "none" else {"position_groups": config.position_groups}
    if "num_heads" in MIXERS[config.mixer].options:
        steps["num_heads"] = config.num_heads
    if "head_dim" in MIXERS[config.mixer].options:  # expand * D is what the heads share
        steps["head_dim"] = config.head_dim // math.gcd(config.head_dim, config.expand)
    return steps


def _linear(inputs: int, outputs: int) -> int:
    return inputs * outputs + outputs


def _front_end(config: HubertConfig) -> int:
    total, inputs = 0, 1
    for channels, kernel, _ in config.conv_layers:
        total, inputs = total + inputs * channels * kernel, channels
    normed = config.conv_layers[:1] if config.front_end == "conv_group" else config.conv_layers
    return total + sum(2 * channels for channels, _, _ in normed)


def _mamba(config: HubertConfig) -> dict[str, int]:
    width, states = config.embed_dim, config.state_size
    inner, rank = config.expand * width, math.ceil(width / 16)
    return {
        "in_proj": width * 2 * inner,
        "conv": inner * (config.conv_kernel + 1),
        "x_proj": inner * (rank + 2 * states),
        "dt_proj": _linear(rank, inner),
        "scan": inner * states + inner,  # A and D
        "out_proj": inner * width,
    }


def _ext_bimamba(config: HubertConfig) -> dict[str, int]:
    parts = {name: 2 * count for name, count in _mamba(config).items()}
    if config.join == "concat_linear":
        parts["join"] = _linear(2 * config.embed_dim, config.embed_dim)
    return parts


def _inn_bimamba(config: HubertConfig) -> dict[str, int]:
    twice = {"x_proj", "dt_proj", "scan"} | (set() if config.share_conv else {"conv"})
    return {name: count * (2 if name in twice else 1) for name, count in _mamba(config).items()}


def _mamba2(config: HubertConfig) -> dict[str, int]:
    width, states = config.embed_dim, config.state_size
    inner = config.expand * width
    heads = inner // config.head_dim
    return {
        "in_proj": width * (2 * inner + 2 * states + heads),
        "conv": (inner + 2 * states) * (config.conv_kernel + 1),
        "scan": 3 * heads,  # A, D and dt's bias
        "out_proj": inner * width,
        "norms": inner,
    }


def _attention(config: HubertConfig) -> dict[str, int]:
    width = config.embed_dim
    return {"qkv_proj": 3 * _linear(width, width), "out_proj": _linear(width, width)}


# mixer -> parameters of one block, by part; the same keys as layers.block.MIXERS.
MIXER_PARAMETERS: dict[str, Callable[[HubertConfig], dict[str, int]]] = {
    "mamba": _mamba,
    "extbimamba": _ext_bimamba,
    "innbimamba": _inn_bimamba,
    "mamba2": _mamba2,
    "attention": _attention,
    "causal_attention": _attention,
}

# First word of a parameter's name, inside the model, a block or a mixer -> part.
_MODEL_PARTS = {"feature_norm": "norms", "encoder_norm": "norms"} | {
    name: name for name in ("front_end", "projection", "mask_embedding", "position", "head")
}
_BLOCK_PARTS = {"ffn": "feed_forward", "ffn_in": "feed_forward", "ffn_out": "feed_forward", "conv": "conv_module"} | {
    name: "norms" for name in ("mixer_norm", "ffn_norm", "norms")
}
_MIXER_PARTS = (
    {name: name for name in ("in_proj", "x_proj", "dt_proj", "out_proj", "join")}
    | {"conv1d": "conv", "conv1d_b": "conv", "x_proj_b": "x_proj", "dt_proj_b": "dt_proj", "norm": "norms"}
    | {name: "scan" for name in ("A_log", "A_b_log", "D", "D_b", "dt_bias")}
    | {name: "qkv_proj" for name in ("q_proj", "k_proj", "v_proj")}
)
_DIRECTIONS = ("forward_mamba", "backward_mamba")


def _part_of(name: str) -> str:
    words = [word for word in name.removeprefix("hubert.").split(".") if word not in _DIRECTIONS]
    if words[0] != "blocks":
        part = _MODEL_PARTS.get(words[0])
    elif words[2] == "mixer":
        part = _MIXER_PARTS.get(words[3])
    else:
        part = _BLOCK_PARTS.get(words[2])
    if part is None:
        raise ValueError(f"parameter {name!r} belongs to no part of a model's size; add it to models.sizing")
    return part


@dataclass(frozen=True)
class StreamState:
    """Bytes that one stream needs between two frames when nothing is computed twice."""

    fixed: dict[str, int]  # part -> bytes, at any length
    growing: dict[str, int]  # part -> bytes per second of audio heard: attention's keys and values

    def num_bytes(self, seconds: float = 0.0) -> float:
        """Return all bytes after some seconds of audio."""
        return sum(self.fixed.values()) + seconds * sum(self.growing.values())


def stream_state(config: HubertConfig, bytes_per_value: int = 4) -> StreamState | None:
    """Return what a stream carries, or None for a model that needs its whole utterance.

    The front end keeps the inputs of each convolution that its next output needs again, the position convolution its
    last ``position_kernel - 1`` frames (the ones it waits for included), a Mamba W - 1 frames and the scan's state,
    attention all keys and values.

    Args:
        config: the model.
        bytes_per_value: 4 for float32 weights, 2 for bfloat16; the scan's state stays float32.
    """
    if math.isinf(look_ahead(config)[0]):
        return None
    layers, width, inner = config.num_layers, config.embed_dim, config.expand * config.embed_dim
    inputs = [1] + [channels for channels, _, _ in config.conv_layers[:-1]]
    kept = (max(k - stride, 0) * size for size, (_, k, stride) in zip(inputs, config.conv_layers, strict=True))
    fixed, growing = {"front_end": sum(kept) * bytes_per_value}, {}
    if config.position != "none":
        fixed["position"] = (config.position_kernel - 1) * width * bytes_per_value
    if config.mixer == "causal_attention":
        frame_rate = SAMPLE_RATE / config.downsample_rate
        growing["attention"] = round(layers * 2 * width * bytes_per_value * frame_rate)
    else:
        convolved = inner + (2 * config.state_size if config.mixer == "mamba2" else 0)
        fixed["conv"] = layers * (config.conv_kernel - 1) * convolved * bytes_per_value
        fixed["scan"] = layers * inner * config.state_size * SCAN_BYTES
    return StreamState(fixed, growing)


class ReceptiveField(NamedTuple):
    """Samples that a frame sees before the mixers, which then see all of the past or of the utterance."""

    front_end: int  # of one output of the convolutions
    positions: int | None  # of one input of the first block; None: all samples, by the group norm over time
    mixers: str  # what the blocks add

    def __str__(self) -> str:
        def samples(count: int) -> str:
            return f"{count} samples ({1000 * count / SAMPLE_RATE:g} ms)"

        if self.positions is None:
            return f"{samples(self.front_end)} by the convolutions, the whole utterance by the group norm over time"
        return f"{samples(self.front_end)} by the front end, {samples(self.positions)} with positions, {self.mixers}"


def receptive_field(config: HubertConfig) -> ReceptiveField:
    """Return what one frame sees."""
    check_sizes(config)
    front_end = config.receptive_field
    kernel = 1 if config.position == "none" else config.position_kernel
    positions = None if config.front_end == "conv_group" else front_end + (kernel - 1) * config.downsample_rate
    causal = MIXERS[config.mixer].causal and config.block == "plain"
    return ReceptiveField(
        front_end, positions, "then all of the past" if causal else "then the whole utterance, both directions of time"
    )
