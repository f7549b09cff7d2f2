"""S3PRL's contract around an SSAMBA model: a list of waveforms in, a list of layers out, always as in evaluation.

B utterances, S samples at 16 kHz, T frames (columns of patches, 2560 samples each), D width of a frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from espnet_mamba.models.ssamba.checkpoints import load_checkpoint
from espnet_mamba.models.ssamba.features import WINDOW
from s3prl_upstream.rng import rng_preserved

FRAMES = ("concat", "mean")


class UpstreamExpert(nn.Module):
    """The model of an upstream folder as S3PRL wants it.

    The published expert cuts recordings into windows of 1, 6 or 10 s and returns the last layer alone; here a
    recording is read whole, and every pair of blocks is a layer, with the embedding first.
    """

    def __init__(
        self, ckpt: str | Path | None = None, frames: str = "concat", repeat_to: int | None = None, **_: Any
    ) -> None:
        """``frames``: ``concat`` or ``mean`` of a column's bands; ``repeat_to``: samples from frame to frame, for what
        wants another rate than one frame per column: each column's vector is repeated."""
        super().__init__()
        if frames not in FRAMES:
            raise ValueError(f"ssamba: frames: {frames!r} is not one of: {' '.join(FRAMES)}")
        self.frames = frames
        with rng_preserved():
            self.model = load_checkpoint(checked_folder(ckpt))
        column = self.model.config.downsample_rate
        self.hop = column if repeat_to is None else int(repeat_to)
        if self.hop < 1 or column % self.hop:
            raise ValueError(f"ssamba: repeat_to: {repeat_to} samples do not divide a column's {column}")
        self.eval()

    def train(self, mode: bool = True) -> UpstreamExpert:
        """Stay in evaluation mode: S3PRL and ESPnet call this on upstreams that must not mask or drop anything."""
        del mode
        return super().train(False)

    def get_downsample_rates(self, key: str) -> int:
        """Return the samples per frame of the layers called ``key``: 2560 for 16 x 16 patches, or ``repeat_to``."""
        del key
        return self.hop

    def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
        """Return every layer for waveforms of shape (S,) at 16 kHz.

        ``hidden_states`` is a list of depth / 2 + 1 tensors (B, ceil(S / hop), D): S3PRL counts a frame per started
        hop and the last patch may not be reached, so an utterance's last frame is then repeated, whatever its batch.
        Clips shorter than 400 samples are filled up with zeros.
        """
        samples = torch.tensor([len(wav) for wav in wavs])
        padded = pad_sequence(list(wavs), batch_first=True)  # (B, S)
        if padded.size(1) < WINDOW:
            padded = nn.functional.pad(padded, (0, WINDOW - padded.size(1)))
        layers, num_frames = self.model.extract_features(padded, samples.clamp(min=WINDOW), self.frames)
        frames = torch.arange(max(1, -(-int(samples.max()) // self.hop)), device=padded.device)
        columns = frames // (self.model.config.downsample_rate // self.hop)
        index = torch.minimum(columns, num_frames.unsqueeze(1) - 1)  # (B, T)
        rows = torch.arange(len(wavs), device=padded.device).unsqueeze(1)
        hidden_states = [layer[rows, index] for layer in layers]
        return {"hidden_states": hidden_states, "last_hidden_state": hidden_states[-1]}


def checked_folder(ckpt: str | Path | None) -> Path:
    """Return the upstream folder as a path; ValueError names what is wrong with it and what to give instead."""
    wanted = "give the folder that the stage 'upstream' wrote, with config.json and model.safetensors"
    if ckpt is None:
        raise ValueError(f"ssamba needs path_or_url (ckpt): {wanted}")
    folder = Path(ckpt)
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}; {wanted}")
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder}: not an upstream folder, {' and '.join(missing)} missing; {wanted}")
    return folder
