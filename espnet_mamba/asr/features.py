"""Frame features of a trained recogniser: what enters the encoder's first block, and what each block gives.

B utterances, S samples at 16 kHz, T frames, D width of the encoder, N blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from espnet_mamba.asr.preparation import read_yaml
from s3prl_upstream.features import GRID, one_by_one
from s3prl_upstream.frozen import FrozenUpstream
from s3prl_upstream.rng import rng_preserved

PREFIX = "asr:"
MODEL = "valid.acc.ave.pth"
_PROBE = (64000, 128000)  # samples of the two silent recordings by which the frame rate is measured


class AsrSource:
    """Layers 0..N of the encoder of an ESPnet recogniser; a ``FeatureSource`` of the targets room.

    A decoder plays no part, so models with one and models of CTC alone are read alike. The norm after the last block is
    left out: it is no block's.
    """

    def __init__(
        self, folder: str | Path, model_file: str = MODEL, device: str = "cpu", grid: int | None = GRID
    ) -> None:
        """Open ``folder/config.yaml`` with the weights in ``folder/model_file``.

        Frames are brought to one per ``grid`` samples (``s3prl_upstream.features.to_grid``); None keeps the encoder's
        own rate.

        Raises:
            FileNotFoundError: no such configuration or weights.
            ValueError: weights that are not those of the configuration, an encoder without ``encoders``.
        """
        self.model = _load(Path(folder), model_file).to(device).eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, FrozenUpstream):
                module.cache_bytes = 0  # every utterance is seen once
        blocks = getattr(self.model.encoder, "encoders", None)
        if blocks is None or len(blocks) == 0:
            raise ValueError(f"{folder}: its encoder ({type(self.model.encoder).__name__}) has no blocks to look into")
        self.blocks: list[nn.Module] = list(blocks)
        self.device, self.grid = device, grid
        short, long = (self._layers(torch.zeros(samples)) for samples in _PROBE)
        # The front end's step is known; how many of them make a frame of the encoder is whole.
        step = getattr(self.model.frontend, "hop_length", 1)
        self.rate = step * max(1, round((_PROBE[1] - _PROBE[0]) / (len(long[0]) - len(short[0])) / step))
        self.hop = grid or self.rate
        self.dims = [layer.shape[1] for layer in short]
        self.names = [f"layer{i}" for i in range(len(short))]

    @torch.no_grad()
    def __call__(self, wavs: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Map ``wavs (B, S)``, ``num_samples (B,)`` to layers ``(B, T, D)`` and frame counts ``(B,)``.

        Utterances are taken one by one: ESPnet's convolution modules read the padding. ValueError for one that is too
        short for the encoder's subsampling.
        """
        return one_by_one(self._layers, wavs, num_samples, [self.rate] * len(self.names), self.grid)

    @torch.no_grad()
    def _layers(self, wav: Tensor) -> list[Tensor]:
        """Return the valid frames of one waveform (S,): N+1 tensors (T, D)."""
        from espnet.nets.pytorch_backend.transformer.subsampling import TooShortUttError

        samples = torch.tensor([len(wav)], device=self.device)
        with _recorded(self.blocks) as states:
            try:
                _, num_frames = self.model.encode(wav[None].to(self.device), samples)
            except TooShortUttError as error:
                raise ValueError(f"an utterance of {len(wav)} samples is too short for the encoder: {error}") from error
        return [state[0, : int(num_frames)].float().cpu() for state in states]


def open_asr(spec: str, device: str = "cpu") -> AsrSource:
    """Open ``asr:FOLDER`` or ``asr:FOLDER:MODEL_FILE``, such as asr:exp/asr/pretrained.

    Raises:
        FileNotFoundError, ValueError: see :class:`AsrSource`.
    """
    folder, _, model_file = spec.removeprefix(PREFIX).partition(":")
    return AsrSource(folder, model_file or MODEL, device)


def _load(folder: Path, model_file: str) -> nn.Module:
    """Build the model of ``folder/config.yaml`` and fill every weight; ESPnet's own loader skips those that differ."""
    from espnet_mamba.asr.task import ASRTask

    read_yaml(folder / "config.yaml")
    path = folder / model_file
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in folder.glob("*.pth"))) or "none"
        raise FileNotFoundError(f"{path}: no such model; those there: {there} (the stage 'asr_train' makes them)")
    with rng_preserved():
        model, _ = ASRTask.build_model_from_file(folder / "config.yaml", None)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not the weights of {folder / 'config.yaml'}: {reason}") from error
    return model


@contextmanager
def _recorded(blocks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list that a pass fills with the first block's input and every block's output, (B, T, D) each."""
    states: list[Tensor] = []

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        states.append(_frames(inputs))

    def leave(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        states.append(_frames(output))

    handles = [blocks[0].register_forward_pre_hook(enter)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _frames(value: Any) -> Tensor:
    """Return the frames among what a block takes or gives: ``x``, ``(x, mask)`` or ``((x, positions), mask)``."""
    while isinstance(value, tuple):
        value = value[0]
    return value
