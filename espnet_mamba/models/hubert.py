"""HuBERT with any mixer in the place of attention: waveform in, one hidden state per layer out.

Letters: B utterances, S samples at 16 kHz, T frames at 50 Hz, D width, C channels of the front end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet_mamba.layers.block import MIXERS, EncoderBlock
from espnet_mamba.layers.conv_frontend import ConvFrontEnd, num_conv_frames
from espnet_mamba.layers.positions import POSITIONS, PositionalConv
from espnet_mamba.models.config import HubertConfig

SAMPLE_RATE = 16000


class HubertOutput(NamedTuple):
    """What a pass over a batch gives."""

    hidden_states: list[Tensor]  # num_layers + 1 tensors (B, T, D); [0] enters block 1, [i] leaves block i
    num_frames: Tensor  # (B,) valid frames
    conv_features: Tensor  # (B, T, C) front end's output, before its norm


class HubertModel(nn.Module):
    """Front end, projection, position, blocks (docs/papers.md 1). Padding and batch mates never change its output."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        if config.position not in POSITIONS:
            raise ValueError(f"position: {config.position!r} is not one of: {' '.join(POSITIONS)}")
        self.config = config
        width, channels = config.embed_dim, config.conv_layers[-1][0]
        self.front_end = ConvFrontEnd(config.conv_layers, config.front_end)
        self.feature_norm = nn.LayerNorm(channels)
        self.projection = nn.Linear(channels, width)
        self.dropout_input = nn.Dropout(config.dropout_input)
        self.mask_embedding = nn.Parameter(torch.rand(width))
        self.position = (
            None
            if config.position == "none"
            else PositionalConv(
                width, config.position_kernel, config.position_groups, causal=config.position == "causal_conv"
            )
        )
        self.encoder_norm = nn.LayerNorm(width) if config.norm == "post" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        options = config.mixer_options()
        self.blocks = nn.ModuleList(
            EncoderBlock(width, config.mixer, options, config.ffn_dim, config.norm, config.dropout)
            for _ in range(config.num_layers)
        )

    def forward(
        self, wavs: Tensor, num_samples: Tensor | None = None, frame_mask: Tensor | None = None
    ) -> HubertOutput:
        """Encode a batch.

        Args:
            wavs: ``(B, S)`` in [-1, 1].
            num_samples: valid samples ``(B,)``; None when every row is full.
            frame_mask: ``(B, T)`` bool, frames that the mask embedding replaces; None for none.

        Raises:
            ValueError: an utterance is shorter than the front end's receptive field.
        """
        self._check_length(wavs, num_samples)
        padded = num_samples is not None and bool((num_samples < wavs.shape[1]).any())
        conv = self.front_end(wavs, num_samples if padded else None)
        conv = _ScaleGradient.apply(conv, self.config.feature_grad_scale)
        lengths = num_conv_frames(num_samples, self.config.conv_layers) if padded else None
        x = self.dropout_input(self.projection(self.feature_norm(conv)))
        if frame_mask is not None:
            x = torch.where(frame_mask[..., None], self.mask_embedding.to(x.dtype), x)
        if lengths is not None:
            x = x * (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
        if self.position is not None:
            x = self.position(x)
        hidden_states = self._run_blocks(self.dropout(self.encoder_norm(x)), lengths)
        counts = torch.full((wavs.shape[0],), x.shape[1], device=x.device) if lengths is None else lengths
        return HubertOutput(hidden_states, counts, conv)

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return all hidden states, ``num_layers + 1`` of ``(B, T, D)``, and their lengths ``(B,)``, unmasked."""
        output = self(wavs, num_samples)
        return output.hidden_states, output.num_frames

    def _run_blocks(self, x: Tensor, lengths: Tensor | None) -> list[Tensor]:
        hidden_states = [x]
        drop = self.config.layer_drop if self.training else 0.0
        skips = (torch.rand(len(self.blocks)) < drop).tolist() if drop else [False] * len(self.blocks)
        for block, skip in zip(self.blocks, skips, strict=True):
            if not skip:
                x, _ = block(x, lengths)
            hidden_states.append(x)
        return hidden_states

    def _check_length(self, wavs: Tensor, num_samples: Tensor | None) -> None:
        shortest = wavs.shape[1] if num_samples is None else int(num_samples.min())
        limit = self.config.receptive_field
        if shortest < limit:
            raise ValueError(
                f"an utterance of {shortest} samples is shorter than one frame ({limit} samples, "
                f"{1000 * limit / SAMPLE_RATE:g} ms); pad it or leave it out"
            )

    @property
    def look_ahead_ms(self) -> float:
        """Future audio, in ms beyond a frame's own window, that its output depends on; infinite for whole utterances.

        A frame's own window is the front end's receptive field: 25 ms that begin with the frame.
        """
        if self.config.front_end == "conv_group" or not MIXERS[self.config.mixer][1]:
            return math.inf
        frames = 0 if self.position is None else self.position.look_ahead_frames
        return 1000.0 * frames * self.config.downsample_rate / SAMPLE_RATE


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
