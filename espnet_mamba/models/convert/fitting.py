"""From renamed tensors to a model: its config from their shapes, and every tensor in its place or an error."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from espnet_mamba.models.config import BASE_CONV_LAYERS, HubertConfig
from espnet_mamba.models.convert.naming import Renamed
from espnet_mamba.models.hubert import HubertModel


def infer_config(tensors: dict[str, Tensor], known: dict[str, Any], source: str) -> tuple[HubertConfig, list[str]]:
    """Find the config of a post-norm HuBERT from its tensors' shapes; ``known`` fields are taken as they are.

    Returns:
        The config, and what had to be assumed because no shape tells it.

    Raises:
        ValueError: a tensor that decides on a size is missing, or no shape tells a size.
    """
    notes: list[str] = []
    width = _shape(tensors, "encoder_norm.weight", source)[0]
    kernel_shape = _shape(tensors, "position.conv.parametrizations.weight.original1", source)
    numbers = {int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")}
    fields: dict[str, Any] = {
        "front_end": "conv_layer" if "front_end.norms.1.weight" in tensors else "conv_group",
        "embed_dim": width,
        "num_layers": max(numbers, default=-1) + 1,
        "norm": "post",
        "position": "conv",
        "position_kernel": kernel_shape[2],
        "position_groups": width // kernel_shape[1],
        "ffn_dim": _shape(tensors, "blocks.0.ffn.up.weight", source)[0] if "blocks.0.ffn.up.weight" in tensors else 0,
    }
    if "conv_layers" not in known:
        fields["conv_layers"] = _conv_layers(tensors, source)
    fields |= _mixer_fields(tensors, width, known, source, notes)
    return HubertConfig(**(fields | known)), notes


def _shape(tensors: dict[str, Tensor], name: str, source: str) -> tuple[int, ...]:
    if name not in tensors:
        raise ValueError(f"{source}: no tensor for {name}; this is not a whole HuBERT")
    return tuple(tensors[name].shape)


def _conv_layers(tensors: dict[str, Tensor], source: str) -> list[tuple[int, int, int]]:
    count = sum(bool(re.fullmatch(r"front_end\.convs\.\d+\.weight", name)) for name in tensors)
    shapes = [_shape(tensors, f"front_end.convs.{i}.weight", source) for i in range(count)]
    kernels = [shape[2] for shape in shapes]
    if kernels != [kernel for _, kernel, _ in BASE_CONV_LAYERS]:
        raise ValueError(f"{source}: the strides of a front end with kernels {kernels} stand nowhere; give a config")
    strides = [stride for *_, stride in BASE_CONV_LAYERS]
    return [(shape[0], shape[2], stride) for shape, stride in zip(shapes, strides, strict=True)]


def _mixer_fields(
    tensors: dict[str, Tensor], width: int, known: dict[str, Any], source: str, notes: list[str]
) -> dict[str, Any]:
    first = "blocks.0.mixer."
    names = {name.removeprefix(first) for name in tensors if name.startswith(first)}
    if "q_proj.weight" in names:
        return _attention_fields(width, known, source, notes)
    if "dt_bias" in names:
        inner = _shape(tensors, first + "norm.weight", source)[0]
        conv = _shape(tensors, first + "conv1d.weight", source)
        heads = _shape(tensors, first + "A_log", source)[0]
        sizes = {"state_size": (conv[0] - inner) // 2, "head_dim": inner // heads}
        return {"mixer": "mamba2", "conv_kernel": conv[2], "expand": inner // width, **sizes}
    part = "forward_mamba." if "forward_mamba.A_log" in names else ""
    inner, states = _shape(tensors, f"{first}{part}A_log", source)
    kernel = _shape(tensors, f"{first}{part}conv1d.weight", source)[2]
    sizes = {"state_size": states, "conv_kernel": kernel, "expand": inner // width}
    return {"mixer": "extbimamba" if part else "mamba", **sizes}


def _attention_fields(width: int, known: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"mixer": "attention"}
    if "mixer" not in known:
        notes.append("mixer: attention (whether it was causal stands nowhere)")
    if "num_heads" not in known:
        if width % 12 and width != 1024:
            raise ValueError(f"{source}: the number of heads at width {width} stands nowhere; give a config")
        fields["num_heads"] = 16 if width == 1024 else 12  # HuBERT Large; HuBERT Base and the papers' Small
        notes.append(f"num_heads: {fields['num_heads']} (HuBERT's at this width)")
    return fields


def build_model(config: HubertConfig, renamed: Renamed, source: str) -> tuple[HubertModel, list[str]]:
    """Put every tensor into a model of ``config``, in float32 and eval mode.

    Returns:
        The model, and what the source does not have and is not needed to encode: its mask embedding, then zeros.

    Raises:
        ValueError: tensors that have no place, the wrong shape, or are missing; named as in the source, with shapes.
    """
    with torch.device("meta"):
        model = HubertModel(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors, notes = dict(renamed.tensors), []
    if "mask_embedding" not in tensors:
        tensors["mask_embedding"] = torch.zeros(config.embed_dim)
        notes.append("mask_embedding: zeros (the source has none; only masked training needs it)")
    problems = []
    for name, tensor in tensors.items():
        theirs, shape = renamed.origin.get(name, name), tuple(tensor.shape)
        if name not in expected:
            problems.append(f"{theirs} {shape} has no place in {config.name} ({config.mixer})")
        elif shape != expected[name]:
            problems.append(f"{theirs} is {shape}, expected {expected[name]}")
    problems += [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    if problems:
        raise ValueError(f"{source}: does not fit: {'; '.join(problems[:8])} ({len(problems)} in all)")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.eval(), notes
