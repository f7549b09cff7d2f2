"""transformers' ``HubertModel``: a folder with config.json, or only its tensors; ``hf_export`` goes the other way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from espnet_mamba.data.files import read_json
from espnet_mamba.models.convert.naming import ORIGINAL0, ORIGINAL1, Renamed, Table, rename
from espnet_mamba.models.convert.reading import read_tensor_file

_POSITION = "encoder.pos_conv_embed.conv."
_LAYER, _BLOCK = "encoder.layers.{i}.", "blocks.{i}."
TABLE: Table = (
    ("feature_extractor.conv_layers.{i}.conv.weight", "front_end.convs.{i}.weight"),
    ("feature_extractor.conv_layers.{i}.layer_norm.{p}", "front_end.norms.{i}.{p}"),
    ("feature_projection.layer_norm.{p}", "feature_norm.{p}"),
    ("feature_projection.projection.{p}", "projection.{p}"),
    ("masked_spec_embed", "mask_embedding"),
    (_POSITION + "bias", "position.conv.bias"),
    (_POSITION + ORIGINAL0, f"position.conv.{ORIGINAL0}"),
    (_POSITION + ORIGINAL1, f"position.conv.{ORIGINAL1}"),
    (_POSITION + "weight_g", f"position.conv.{ORIGINAL0}"),  # written before torch had parametrizations
    (_POSITION + "weight_v", f"position.conv.{ORIGINAL1}"),
    ("encoder.layer_norm.{p}", "encoder_norm.{p}"),
    (_LAYER + "attention.{q}_proj.{p}", _BLOCK + "mixer.{q}_proj.{p}"),
    (_LAYER + "layer_norm.{p}", _BLOCK + "mixer_norm.{p}"),
    (_LAYER + "feed_forward.intermediate_dense.{p}", _BLOCK + "ffn.up.{p}"),
    (_LAYER + "feed_forward.output_dense.{p}", _BLOCK + "ffn.down.{p}"),
    (_LAYER + "final_layer_norm.{p}", _BLOCK + "ffn_norm.{p}"),
    ("lm_head.{p}", None),  # HubertForCTC
    ("projector.{p}", None),  # HubertForSequenceClassification
    ("classifier.{p}", None),
    ("layer_weights", None),
    ("final_proj.{p}", None),  # a pretraining head without its class embeddings is of no use
)
FIELDS = {  # transformers' name -> ours
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "num_conv_pos_embeddings": "position_kernel",
    "num_conv_pos_embedding_groups": "position_groups",
    "feat_proj_dropout": "dropout_input",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "layerdrop": "layer_drop",
}
REQUIRED = {  # what our model is; transformers' defaults are the same
    "do_stable_layer_norm": False,
    "conv_bias": False,
    "feat_proj_layer_norm": True,
    "conv_pos_batch_norm": False,
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
}
CONV_DEFAULTS = {"conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
FRONT_ENDS = {"group": "conv_group", "layer": "conv_layer"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def recognises(state: dict[str, Tensor]) -> bool:
    """Tell whether ``state`` bears transformers' names."""
    return any(name.removeprefix("hubert.") == "feature_projection.projection.weight" for name in state)


def renamed(state: dict[str, Tensor], source: str) -> Renamed:
    """Rename a state dict of ``HubertModel``, or of a model that holds one (ValueError: see ``rename``)."""
    if "feature_extractor.conv_layers.0.conv.bias" in state:
        raise ValueError(f"{source}: conv_bias: our front end has no biases")
    return rename({name.removeprefix("hubert."): tensor for name, tensor in state.items()}, TABLE, source)


def read_folder(folder: Path) -> dict[str, Any]:
    """Read the tensors of a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: see ``read_tensor_file``.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return read_tensor_file(folder / name)
    raise FileNotFoundError(f"{folder}: neither {' nor '.join(WEIGHTS)} is there")


def known_fields(folder: Path) -> dict[str, Any]:
    """Translate a folder's config.json into fields of ours.

    Raises:
        ValueError: another kind of model, or a setting that our model does not have.
    """
    path = folder / "config.json"
    settings = read_json(path)
    if settings.get("model_type") != "hubert":
        raise ValueError(f"{path}: model_type is {settings.get('model_type')!r}; only 'hubert' can be converted")
    for name, value in REQUIRED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {settings[name]!r}; our model has {value!r}")
    norm = settings.get("feat_extract_norm", "group")
    if norm not in FRONT_ENDS:
        raise ValueError(f"{path}: feat_extract_norm is {norm!r}, not one of: {' '.join(FRONT_ENDS)}")
    layers = [settings.get(name, default) for name, default in CONV_DEFAULTS.items()]
    fields = {ours: settings[theirs] for theirs, ours in FIELDS.items() if theirs in settings}
    return fields | {
        "front_end": FRONT_ENDS[norm],
        "mixer": "attention",
        "conv_layers": list(zip(*layers, strict=True)),
    }
