"""A Transformer of ours as a folder that ``transformers.HubertModel.from_pretrained`` loads, with equal outputs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from espnet_mamba.data.files import write_json, write_text
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.convert.huggingface import FIELDS, FRONT_ENDS, REQUIRED, TABLE
from espnet_mamba.models.convert.naming import rename_back
from espnet_mamba.models.hubert import HubertModel

NEEDED = {"mixer": "attention", "block": "plain", "norm": "post", "position": "conv"}


def export_huggingface(model: HubertModel, folder: str | Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and README.md, whole or not at all.

    Raises:
        ValueError: the model is no HuBERT as transformers has it; the field is named.
    """
    folder, config = Path(folder), model.config
    for field, value in NEEDED.items():
        if getattr(config, field) != value:
            raise ValueError(
                f"{config.name}: {field} is {getattr(config, field)!r}; transformers' HuBERT has {value!r}"
            )
    if not config.ffn_dim:
        raise ValueError(f"{config.name}: ffn_dim is 0; transformers' HuBERT has a feed-forward part")
    state = model.state_dict()
    names = rename_back(list(state), TABLE)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {names[name]: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    write_json(temporary / "config.json", huggingface_config(config))
    write_json(temporary / "preprocessor_config.json", _preprocessor())
    usage = f'from transformers import HubertModel\n\nmodel = HubertModel.from_pretrained("{folder.name}")'
    card = f"# {config.name}\n\nA HuBERT of espnet-mamba, for transformers.\n\n```python\n{usage}\n```\n"
    write_text(temporary / "README.md", card)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def huggingface_config(config: HubertConfig) -> dict[str, Any]:
    """Return the config.json of transformers' ``HubertModel``."""
    channels, kernels, strides = zip(*config.conv_layers, strict=True)
    front_end = {ours: theirs for theirs, ours in FRONT_ENDS.items()}[config.front_end]
    return {
        "architectures": ["HubertModel"],
        "model_type": "hubert",
        "feat_extract_norm": front_end,
        "conv_dim": list(channels),
        "conv_kernel": list(kernels),
        "conv_stride": list(strides),
        "num_feat_extract_layers": len(channels),
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        **REQUIRED,
    }


def _preprocessor() -> dict[str, Any]:
    """Return what their feature extractor must know: our models read audio as it is, 16 kHz, in [-1, 1]."""
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "do_normalize": False,
        "feature_size": 1,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
