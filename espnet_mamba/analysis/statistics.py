"""One pass over audio: every layer of a model, valid frames only, kept in memory within a stated limit.

F frames of all utterances, D_l width of layer l, T frames of one utterance at 50 Hz.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from espnet_mamba.analysis.sampling import sample_names
from espnet_mamba.data.files import atomic_path
from espnet_mamba.data.manifest import Utterance
from espnet_mamba.targets.features import FeatureSource, iterate_features

_HOP = 320
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class LayerFeatures:
    """The frames of some utterances, in order of their ids: per layer (F, D_l), and whose frame each is."""

    names: list[str]
    layers: list[Tensor]
    utt_ids: list[str]
    utterance: Tensor  # (F,) index into utt_ids

    @property
    def sizes(self) -> list[int]:
        """T of each utterance."""
        return torch.bincount(self.utterance, minlength=len(self.utt_ids)).tolist()

    def of_utterance(self, layer: int) -> list[Tensor]:
        """Return one layer cut by utterance: (T, D_l) each."""
        return list(self.layers[layer].split(self.sizes))


def choose_utterances(
    utterances: Sequence[Utterance],
    max_utterances: int | None,
    max_memory_mb: float,
    bytes_per_frame: int,
    seed: int,
) -> list[Utterance]:
    """Choose utterances by a draw that hangs on their names; stop before their frames pass the memory limit.

    ``bytes_per_frame`` is the widest system's, so that all systems are measured on the same utterances.
    ValueError when not one utterance fits.
    """
    by_id = {utterance.utt_id: utterance for utterance in utterances}
    names = sample_names(list(by_id), max_utterances, seed)
    limit = max_memory_mb * 2**20
    needed = [by_id[name].num_samples // _HOP * bytes_per_frame for name in names]
    while names and sum(needed) > limit:
        share = max(1, min(len(names) - 1, int(len(names) * limit / sum(needed))))
        if len(names) == 1:
            raise ValueError(
                f"{names[0]}: its frames alone need {needed[0] / 2**20:.0f} MB, the limit is {max_memory_mb:g} MB; "
                "raise max_memory_mb or set dtype: float16"
            )
        names = sample_names(names, share, seed)
        needed = [by_id[name].num_samples // _HOP * bytes_per_frame for name in names]
    return [by_id[name] for name in names]


def collect_features(
    source: FeatureSource, utterances: Sequence[Utterance], dtype: torch.dtype = torch.float32, label: str = "features"
) -> LayerFeatures:
    """Extract all layers of ``utterances`` in one pass; ``label`` (system and set) stands before progress and errors.

    ValueError names label, utterance and layer of a NaN or infinity, and a layer that is the same in every frame.
    """
    found: dict[str, list[Tensor]] = {}
    frames = iterate_features(source, utterances)
    for utterance, layers in tqdm(frames, total=len(utterances), desc=label, unit="utt", mininterval=5):
        for name, layer in zip(source.names, layers, strict=True):
            if not torch.isfinite(layer).all():
                raise ValueError(
                    f"{label}: {utterance.utt_id}: {name} holds NaN or infinity; check the model and this recording"
                )
            if dtype == torch.float16 and layer.numel() and layer.abs().max() > torch.finfo(dtype).max:
                raise ValueError(
                    f"{label}: {utterance.utt_id}: {name} reaches {float(layer.abs().max()):.3g}, float16 holds 65504; "
                    "set dtype: float32"
                )
        found[utterance.utt_id] = [layer.to(dtype, copy=True) for layer in layers]
    utt_ids = sorted(found)
    sizes = torch.tensor([len(found[utt_id][0]) for utt_id in utt_ids])
    joined = [torch.cat([found[utt_id][layer] for utt_id in utt_ids]) for layer in range(len(source.names))]
    for name, layer in zip(source.names, joined, strict=True):
        if len(layer) and bool((layer == layer[0]).all()):
            raise ValueError(
                f"{label}: {name} is constant, the same in all {len(layer)} frames, and nothing can be measured of it; "
                "check the model (or the audio), or leave the system out"
            )
    return LayerFeatures(
        list(source.names), joined, utt_ids, torch.repeat_interleave(torch.arange(len(utt_ids)), sizes)
    )


def split_layer(features: LayerFeatures, name: str) -> tuple[LayerFeatures, Tensor | None]:
    """Return the features without the layer called ``name``, and that layer's frames (F, D_l), None if not there."""
    if name not in features.names:
        return features, None
    index = features.names.index(name)
    rest = [number for number in range(len(features.names)) if number != index]
    kept = LayerFeatures(
        [features.names[i] for i in rest], [features.layers[i] for i in rest], features.utt_ids, features.utterance
    )
    return kept, features.layers[index]


def write_features(path: str | Path, features: LayerFeatures) -> None:
    """Write features as safetensors: a tensor (F, D_l) per layer and ``utterance`` (F,); ids and order as metadata."""
    tensors = dict(zip(features.names, (layer.contiguous() for layer in features.layers), strict=True))
    ids = {"utt_ids": json.dumps(features.utt_ids), "layers": json.dumps(features.names)}
    with atomic_path(path) as temporary:
        save_file(tensors | {"utterance": features.utterance}, temporary, ids)


def read_features(path: str | Path) -> LayerFeatures:
    """Read what :func:`write_features` wrote."""
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        names = json.loads(about["layers"])
        layers = [file.get_tensor(name) for name in names]
        return LayerFeatures(names, layers, json.loads(about["utt_ids"]), file.get_tensor("utterance"))
