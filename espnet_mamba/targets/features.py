"""Where frame features come from: MFCC, log-mel, or the layers of a model folder, behind one call.

Letters: B utterances, S samples at 16 kHz, T frames, D_l width of layer l.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from espnet_mamba.data.audio import read_audio
from espnet_mamba.data.manifest import Utterance
from espnet_mamba.models.folders import load_layers
from espnet_mamba.models.hubert import HubertModel

CONV = "conv"


class FeatureSource(Protocol):
    """Features of a padded batch, one tensor per layer.

    A source whose model has a convolutional front end also has a method ``add_conv``, see :func:`add_conv`.
    """

    names: list[str]
    dims: list[int]
    hop: int  # samples from frame to frame

    def __call__(self, wavs: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Map ``wavs (B, S)``, ``num_samples (B,)`` to layers ``(B, T, D_l)`` and frame counts ``(B,)``."""
        ...


class SpectralSource:
    """MFCC or log-mel; utterances are taken one by one, so padding cannot enter."""

    def __init__(self, kind: str) -> None:
        from espnet_mamba.targets import spectral

        self._compute, width, self.hop, self._step = {
            "mfcc100": (spectral.mfcc, 39, 160, 1),
            "mfcc": (spectral.mfcc, 39, 320, 2),
            "logmel": (spectral.log_mel, 80, 320, 1),
        }[kind]
        self.names, self.dims = [kind], [width]

    def __call__(self, wavs: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """See ``FeatureSource``."""
        rows = [self._compute(wav[:count])[:: self._step] for wav, count in zip(wavs, num_samples, strict=True)]
        return [pad_sequence(rows, batch_first=True)], torch.tensor([len(row) for row in rows])


class ModelSource:
    """All hidden states of a model folder, unmasked, without gradient; SSAMBA's are repeated to 50 Hz."""

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        loaded = load_layers(folder)
        self.model = loaded.model.to(device)
        self.device, self.hop = device, loaded.hop
        self.names = [f"layer{i}" for i in range(loaded.num_layers)]
        self.dims = [loaded.width] * len(self.names)
        self._only: int | None = None

    def keep_only(self, layer: int) -> None:
        """Give this one layer from now on, left on the model's device; the blocks above it are not run."""
        self.names, self.dims, self._only = [self.names[layer]], [self.dims[layer]], layer
        if isinstance(self.model, HubertModel):
            self.model.blocks = self.model.blocks[:layer]

    def add_conv(self) -> bool:
        """See :func:`add_conv`; SSAMBA has no convolutional front end."""
        if not isinstance(self.model, HubertModel):
            return False
        if CONV not in self.names:
            self.names.append(CONV)
            self.dims.append(self.model.config.conv_layers[-1][0])
        return True

    @torch.no_grad()
    def __call__(self, wavs: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """See ``FeatureSource``."""
        wavs, num_samples = wavs.to(self.device), num_samples.to(self.device)
        if CONV in self.names:
            output = self.model(wavs, num_samples)
            layers, num_frames = [*output.hidden_states, output.conv_features], output.num_frames
        else:
            layers, num_frames = self.model.extract_features(wavs, num_samples)
        if self._only is not None:
            return [layers[self._only]], num_frames.cpu()
        return [layer.cpu() for layer in layers], num_frames.cpu()


def add_conv(source: FeatureSource) -> bool:
    """Let a source also give its front end's output, before norm and projection, as its last layer, named ``conv``.

    It comes out of the same pass as the layers. Returns False, and changes nothing, for a source without such a front
    end (log-mel, MFCC, SSAMBA's patches, a recogniser).
    """
    add = getattr(source, "add_conv", None)
    return add is not None and add()


def open_features(spec: str, device: str = "cpu") -> FeatureSource:
    """Open ``mfcc``, ``mfcc100`` (100 Hz), ``logmel``, or a model folder.

    Raises:
        FileNotFoundError: ``spec`` is no known name and no model folder.
    """
    if spec in ("mfcc", "mfcc100", "logmel"):
        return SpectralSource(spec)
    return ModelSource(spec, device)


def open_layer(spec: str, layer: int, device: str = "cpu") -> FeatureSource:
    """Open a source as :func:`open_features` does that gives one layer only.

    Raises:
        ValueError: the layer does not exist.
        FileNotFoundError: see :func:`open_features`.
    """
    source = open_features(spec, device)
    if not 0 <= layer < len(source.names):
        raise ValueError(f"{spec}: layer {layer} does not exist; it has {', '.join(source.names)}")
    if isinstance(source, ModelSource):
        source.keep_only(layer)
    return source


def plan_batches(utterances: Sequence[Utterance], batch_seconds: float = 48.0) -> list[list[Utterance]]:
    """Cut the utterances, sorted by length, into batches of at most ``batch_seconds`` with padding, shortest first."""
    batches: list[list[Utterance]] = []
    for utterance in sorted(utterances, key=lambda utterance: (utterance.num_samples, utterance.utt_id)):
        if not batches or (len(batches[-1]) + 1) * utterance.num_samples > batch_seconds * 16000:
            batches.append([])
        batches[-1].append(utterance)
    return batches


def iterate_features(
    source: FeatureSource, utterances: Sequence[Utterance], batch_seconds: float = 48.0
) -> Iterator[tuple[Utterance, list[Tensor]]]:
    """Read audio and yield each utterance with its layers ``(T, D_l)``, valid frames only, in order of duration.

    What is yielded for an utterance does not depend on ``batch_seconds`` beyond rounding.
    """
    for batch in plan_batches(utterances, batch_seconds):
        wavs = [torch.from_numpy(read_audio(utterance.path)) for utterance in batch]
        yield from zip(batch, features_of(source, wavs), strict=True)


def features_of(source: FeatureSource, wavs: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the layers ``(T, D_l)``, valid frames only, of each recording ``(S,)`` of one batch."""
    num_samples = torch.tensor([len(wav) for wav in wavs])
    layers, num_frames = source(pad_sequence(list(wavs), batch_first=True), num_samples)
    return [[layer[row, : num_frames[row]] for layer in layers] for row in range(len(wavs))]
