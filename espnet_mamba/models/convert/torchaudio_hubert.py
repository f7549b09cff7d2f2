"""torchaudio's ``hubert_base`` and ``hubert_pretrain_base``: state dicts without any settings."""

from __future__ import annotations

from torch import Tensor

from espnet_mamba.models.convert.naming import ORIGINAL0, ORIGINAL1, Renamed, Table, rename

_POSITION = "encoder.transformer.pos_conv_embed.conv."
_LAYER, _BLOCK = "encoder.transformer.layers.{i}.", "blocks.{i}."
TABLE: Table = (
    ("feature_extractor.conv_layers.{i}.conv.weight", "front_end.convs.{i}.weight"),
    ("feature_extractor.conv_layers.{i}.layer_norm.{p}", "front_end.norms.{i}.{p}"),
    ("encoder.feature_projection.layer_norm.{p}", "feature_norm.{p}"),
    ("encoder.feature_projection.projection.{p}", "projection.{p}"),
    (_POSITION + "bias", "position.conv.bias"),
    (_POSITION + ORIGINAL0, f"position.conv.{ORIGINAL0}"),
    (_POSITION + ORIGINAL1, f"position.conv.{ORIGINAL1}"),
    (_POSITION + "weight_g", f"position.conv.{ORIGINAL0}"),
    (_POSITION + "weight_v", f"position.conv.{ORIGINAL1}"),
    ("encoder.transformer.layer_norm.{p}", "encoder_norm.{p}"),
    (_LAYER + "attention.{q}_proj.{p}", _BLOCK + "mixer.{q}_proj.{p}"),
    (_LAYER + "layer_norm.{p}", _BLOCK + "mixer_norm.{p}"),
    (_LAYER + "feed_forward.intermediate_dense.{p}", _BLOCK + "ffn.up.{p}"),
    (_LAYER + "feed_forward.output_dense.{p}", _BLOCK + "ffn.down.{p}"),
    (_LAYER + "final_layer_norm.{p}", _BLOCK + "ffn_norm.{p}"),
    ("mask_generator.mask_embedding", "mask_embedding"),
    ("logit_generator.final_proj.{p}", "head.projection.{p}"),
    ("logit_generator.label_embeddings", "head.classes"),
    ("aux.{p}", None),  # the CTC layer of hubert_base(aux_num_out=...)
)


def recognises(state: dict[str, Tensor]) -> bool:
    """Tell whether ``state`` bears torchaudio's names."""
    return any(name.removeprefix("wav2vec2.") == "encoder.feature_projection.projection.weight" for name in state)


def renamed(state: dict[str, Tensor], source: str) -> Renamed:
    """Rename a state dict (ValueError: see ``rename``)."""
    if "feature_extractor.conv_layers.1.layer_norm.weight" in state:
        raise ValueError(
            f"{source}: a torchaudio HuBERT with a layer-norm front end (Large, XLarge) has its norms first; "
            "the norm behind its last layer has no place in our pre-norm model"
        )
    return rename({name.removeprefix("wav2vec2."): tensor for name, tensor in state.items()}, TABLE, source)
