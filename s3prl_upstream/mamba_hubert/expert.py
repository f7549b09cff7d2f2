"""S3PRL's contract around a HuBERT model: a list of waveforms in, a list of layers out, always as in evaluation.

B utterances, S samples at 16 kHz, T frames at 50 Hz, D model width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from espnet_mamba.models.checkpoints import load_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from s3prl_upstream.rng import rng_preserved

HOP = 320  # samples between frames, for every layer
WINDOW = 400  # samples that the first frame sees; shorter clips are filled up with zeros


class UpstreamExpert(nn.Module):
    """The model of an upstream folder as S3PRL wants it."""

    def __init__(self, ckpt: str | Path | None = None, **_: Any) -> None:
        super().__init__()
        with rng_preserved():
            self.model = load_checkpoint(checked_folder(ckpt))
        if self.model.config.downsample_rate != HOP:
            rate = self.model.config.downsample_rate
            raise ValueError(f"{ckpt}: one frame per {rate} samples; S3PRL upstreams of this package have {HOP}")
        self.eval()

    def train(self, mode: bool = True) -> UpstreamExpert:
        """Stay in evaluation mode: S3PRL and ESPnet call this on upstreams that must not mask or drop anything."""
        del mode
        return super().train(False)

    def __reduce__(self) -> tuple[Any, ...]:
        # The position convolution is parametrized, and torch refuses to pickle such modules as they are.
        trainable = [parameter.requires_grad for parameter in self.parameters()]
        return _restore, (self.model.config, self.model.state_dict(), trainable)

    def get_downsample_rates(self, key: str) -> int:
        """Return the samples per frame of the layers called ``key``."""
        del key
        return HOP

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Return every layer for waveforms of shape (S,) at 16 kHz.

        ``hidden_states`` is a list of N+1 tensors (B, ceil(S/320), D): S3PRL counts a frame per started hop, the
        convolutions give fewer, so the last frame of each utterance is repeated, whatever the batch it is in.
        """
        samples = torch.tensor([len(wav) for wav in wavs], device=wavs[0].device)
        padded = pad_sequence(list(wavs), batch_first=True)  # (B, S)
        if padded.size(1) < WINDOW:
            padded = nn.functional.pad(padded, (0, WINDOW - padded.size(1)))
        layers, num_frames = self.model.extract_features(padded, samples.clamp(min=WINDOW))
        total = -(-int(samples.max()) // HOP)
        frames = torch.arange(max(total, 1), device=padded.device)
        index = torch.minimum(frames, num_frames.to(frames.device).unsqueeze(1) - 1)  # (B, T)
        rows = torch.arange(len(wavs), device=padded.device).unsqueeze(1)
        hidden_states = [layer[rows, index] for layer in layers]
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}


def _restore(config: HubertConfig, weights: dict[str, Tensor], trainable: list[bool]) -> UpstreamExpert:
    """Rebuild an expert from what ``__reduce__`` kept, on the device where its weights are."""
    expert = UpstreamExpert.__new__(UpstreamExpert)
    nn.Module.__init__(expert)
    with rng_preserved():
        expert.model = HubertModel(config).to(next(iter(weights.values())).device)
    expert.model.load_state_dict(weights)
    for parameter, wanted in zip(expert.parameters(), trainable, strict=True):
        parameter.requires_grad_(wanted)
    return expert.eval()


def checked_folder(ckpt: str | Path | None) -> Path:
    """Return the upstream folder as a path; ValueError names what is wrong with it and what to give instead."""
    wanted = "give the folder that the stage 'upstream' wrote, with config.json and model.safetensors"
    if ckpt is None:
        raise ValueError(f"mamba_hubert needs path_or_url (ckpt): {wanted}")
    folder = Path(ckpt)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {wanted}")
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: not an upstream folder, {' and '.join(missing)} missing; {wanted}")
    return folder
