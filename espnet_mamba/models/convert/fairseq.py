"""fairseq's HuBERT and the papers' Mamba-HuBERTs, as their training saved them or as S3PRL repacked them.

The Mamba names are those of paper 2's public fairseq (``mamba``, ``mamba_rev``, ``mamba_layer_norm``,
``bimamba_layer_norm``). Its InnBiMamba and paper 1's ConBiMamba layer were never published, so their names are unknown.
Our ExtBiMamba reverses an utterance over its own length; theirs also over an even-length frame of zeros
(docs/papers.md 9), so the last frames of an odd-length utterance differ a little from what their code would give.
"""

from __future__ import annotations

import ast
from typing import Any

from torch import Tensor

from espnet_mamba.models.convert.naming import ORIGINAL0, ORIGINAL1, Renamed, Table, rename
from espnet_mamba.models.convert.reading import plain

_LAYER, _BLOCK = "encoder.layers.{i}.", "blocks.{i}."
TABLE: Table = (
    ("feature_extractor.conv_layers.{i}.0.weight", "front_end.convs.{i}.weight"),
    ("feature_extractor.conv_layers.{i}.2.{p}", "front_end.norms.{i}.{p}"),  # group norm
    ("feature_extractor.conv_layers.{i}.2.1.{p}", "front_end.norms.{i}.{p}"),  # layer norm
    ("layer_norm.{p}", "feature_norm.{p}"),
    ("post_extract_proj.{p}", "projection.{p}"),
    ("mask_emb", "mask_embedding"),
    ("encoder.pos_conv.0.bias", "position.conv.bias"),
    ("encoder.pos_conv.0.weight_g", f"position.conv.{ORIGINAL0}"),
    ("encoder.pos_conv.0.weight_v", f"position.conv.{ORIGINAL1}"),
    (f"encoder.pos_conv.0.{ORIGINAL0}", f"position.conv.{ORIGINAL0}"),
    (f"encoder.pos_conv.0.{ORIGINAL1}", f"position.conv.{ORIGINAL1}"),
    ("encoder.layer_norm.{p}", "encoder_norm.{p}"),
    (_LAYER + "self_attn.{q}_proj.{p}", _BLOCK + "mixer.{q}_proj.{p}"),
    (_LAYER + "self_attn_layer_norm.{p}", _BLOCK + "mixer_norm.{p}"),
    (_LAYER + "mamba_layer_norm.{p}", _BLOCK + "mixer_norm.{p}"),
    (_LAYER + "bimamba_layer_norm.{p}", _BLOCK + "mixer_norm.{p}"),
    (_LAYER + "fc1.{p}", _BLOCK + "ffn.up.{p}"),
    (_LAYER + "fc2.{p}", _BLOCK + "ffn.down.{p}"),
    (_LAYER + "final_layer_norm.{p}", _BLOCK + "ffn_norm.{p}"),
    ("final_proj.{p}", "head.projection.{p}"),
    ("label_embs_concat", "head.classes"),
    ("target_glu.{rest}", None),
)
ONE_WAY: Table = ((_LAYER + "mamba.{rest}", _BLOCK + "mixer.{rest}"),)
BOTH_WAYS: Table = (
    (_LAYER + "mamba.{rest}", _BLOCK + "mixer.forward_mamba.{rest}"),
    (_LAYER + "mamba_rev.{rest}", _BLOCK + "mixer.backward_mamba.{rest}"),
)
FIELDS = {  # fairseq's name -> ours, of what no shape tells
    "encoder_attention_heads": "num_heads",
    "dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "activation_dropout": "activation_dropout",
    "dropout_input": "dropout_input",
    "encoder_layerdrop": "layer_drop",
    "feature_grad_mult": "feature_grad_scale",
}


def recognises(state: dict[str, Tensor]) -> bool:
    """Tell whether ``state`` bears fairseq's names."""
    return "feature_extractor.conv_layers.0.0.weight" in state


def renamed(state: dict[str, Tensor], source: str) -> Renamed:
    """Rename a state dict (ValueError: see ``rename``)."""
    both_ways = any(".mamba_rev." in name for name in state)
    return rename(state, [*TABLE, *(BOTH_WAYS if both_ways else ONE_WAY)], source)


def model_settings(contents: dict[str, Any]) -> dict[str, Any]:
    """Find the model's settings: fairseq's ``cfg`` or ``args``, S3PRL's ``model_cfg``; empty if there are none."""
    settings = plain(contents.get("cfg"))
    if isinstance(settings, dict):
        settings = settings.get("model")
    settings = settings or plain(contents.get("model_cfg")) or plain(contents.get("args"))
    return settings if isinstance(settings, dict) else {}


def known_fields(settings: dict[str, Any], state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Translate fairseq's settings of a model into fields of ours.

    Raises:
        ValueError: a setting that our model does not have, or one that is missing and decides on the order of norms.
    """
    if settings.get("layer_norm_first"):
        raise ValueError(
            f"{source}: layer_norm_first: the norm behind its last layer has no place in our pre-norm model"
        )
    if not settings and "feature_extractor.conv_layers.0.2.1.weight" in state:
        raise ValueError(f"{source}: holds no settings, and a layer-norm front end often means layer_norm_first")
    activation = settings.get("activation_fn", "gelu")
    if activation != "gelu":
        raise ValueError(f"{source}: activation_fn: {activation!r}; our blocks have gelu")
    fields = {ours: settings[theirs] for theirs, ours in FIELDS.items() if settings.get(theirs) is not None}
    attention = "encoder.layers.0.self_attn.q_proj.weight" in state
    if attention and settings:
        fields["mixer"] = "causal_attention" if settings.get("causal_attn") else "attention"
    elif not attention:
        fields["dt_init"] = "bert_reset"  # how these models began (docs/papers.md 9): what a random control must repeat
    if settings.get("conv_feature_layers"):
        fields["conv_layers"] = parse_conv_layers(settings["conv_feature_layers"], source)
    return fields


def parse_conv_layers(text: str, source: str) -> list[tuple[int, int, int]]:
    """Evaluate fairseq's ``"[(512,10,5)] + [(512,3,2)] * 4"``: lists, tuples, whole numbers, + and * only."""

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            items = [value(item) for item in node.elts]
            return items if isinstance(node, ast.List) else tuple(items)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(right, int) and 0 <= right <= 64 and isinstance(left, list):
                return left * right
        raise ValueError

    try:
        layers = value(ast.parse(text, mode="eval").body)
        return [(int(channels), int(kernel), int(stride)) for channels, kernel, stride in layers]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"{source}: conv_feature_layers: {text[:100]!r} is not a list of layers") from error
