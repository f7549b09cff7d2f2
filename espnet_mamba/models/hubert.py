"""HuBERT with any mixer in the place of attention: waveform in, one hidden state per layer out.

Letters: B utterances, S samples at 16 kHz, T frames at 50 Hz, D width, C channels of the front end.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet_mamba.layers.block import MIXERS, EncoderBlock, MacaronBlock
from espnet_mamba.layers.conv_frontend import ConvFrontEnd, num_conv_frames
from espnet_mamba.layers.packing import Lengths, Packing
from espnet_mamba.layers.positions import POSITIONS, PositionalConv
from espnet_mamba.models.config import HubertConfig

log = logging.getLogger(__name__)

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
        self.said_short = False
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
        self.blocks = nn.ModuleList(_build_block(config) for _ in range(config.num_layers))
        log.info("%s: look-ahead: %s", config.name, self.look_ahead)

    def forward(
        self,
        wavs: Tensor,
        num_samples: Tensor | None = None,
        frame_mask: Tensor | None = None,
        packed: bool = False,
    ) -> HubertOutput:
        """Encode a batch, or utterances packed into one row without padding.

        Args:
            wavs: ``(B, S)`` in [-1, 1]; packed, a row ``(1, S)`` of ``layers.packing.pack_waveforms``.
            num_samples: valid samples ``(B,)``; None when every row is full. On the CPU they spare a GPU the wait for
                them, wherever ``wavs`` is. An utterance shorter than the front end's receptive field has no frames;
                that is said once.
            frame_mask: ``(B, T)`` bool, frames that the mask embedding replaces; None for none. Packed, ``(1, F)``.
            packed: whether ``wavs`` is a packed row; tensors of the output are then ``(1, F, ...)``, F the sum of all
                frames.

        Raises:
            ValueError: a packed row without ``num_samples``.
        """
        if packed:
            return self._forward_packed(wavs, num_samples, frame_mask)
        samples = lengths = None
        host = None if num_samples is None else num_samples.cpu()  # what is asked below must not wait for a GPU
        if host is not None and bool((host < wavs.shape[1]).any()):
            samples = num_samples.to(wavs.device, non_blocking=True)
            # masked_fill, not multiplication: NaN in the padding must not come through
            wavs = wavs.masked_fill(torch.arange(wavs.shape[1], device=wavs.device) >= samples[:, None], 0.0)
        if wavs.shape[1] < self.config.receptive_field:
            return self._without_frames(wavs)
        conv = self.front_end(wavs, samples)
        if samples is not None:
            lengths = self._num_frames(host).to(wavs.device, non_blocking=True)
        counts = torch.full((wavs.shape[0],), conv.shape[1], device=conv.device) if lengths is None else lengths
        return self._encode(conv, lengths, counts, frame_mask)

    def _forward_packed(self, row: Tensor, num_samples: Tensor | None, frame_mask: Tensor | None) -> HubertOutput:
        if num_samples is None or row.shape[0] != 1:
            raise ValueError(f"a packed row is (1, S) with num_samples (B,), given {tuple(row.shape)}, {num_samples}")
        host = num_samples.cpu()
        packing = Packing(self._num_frames(host), row.device)
        conv = self.front_end.forward_packed(row, host)
        return self._encode(conv, packing, packing.lengths, frame_mask)

    def _without_frames(self, wavs: Tensor) -> HubertOutput:
        """Answer a batch in which no utterance reaches one frame."""
        self._num_frames(torch.full((1,), wavs.shape[1]))
        empty = wavs.new_zeros(wavs.shape[0], 0, self.config.embed_dim)
        conv = wavs.new_zeros(wavs.shape[0], 0, self.config.conv_layers[-1][0])
        counts = torch.zeros(wavs.shape[0], dtype=torch.long, device=wavs.device)
        return HubertOutput([empty] * (self.config.num_layers + 1), counts, conv)

    def _num_frames(self, num_samples: Tensor) -> Tensor:
        frames = num_conv_frames(num_samples, self.config.conv_layers)
        if not self.said_short and bool((frames <= 0).any()):
            self.said_short = True
            limit = self.config.receptive_field
            log.warning(
                "an utterance of %d samples is shorter than one frame (%d samples, %g ms) and has none",
                int(num_samples.min()),
                limit,
                1000 * limit / SAMPLE_RATE,
            )
        return frames.clamp(min=0)

    def _encode(self, conv: Tensor, lengths: Lengths, counts: Tensor, frame_mask: Tensor | None) -> HubertOutput:
        """Run everything behind the front end, whose output is ``conv (B, T, C)``."""
        conv = _ScaleGradient.apply(conv, self.config.feature_grad_scale)
        x = self.dropout_input(self.projection(self.feature_norm(conv)))
        if frame_mask is not None:
            x = torch.where(frame_mask[..., None], self.mask_embedding.to(x.dtype), x)
        if isinstance(lengths, Tensor):
            x = x.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None], 0.0)
        if self.position is not None:
            x = self.position(x, lengths)
        hidden_states = self._run_blocks(self.dropout(self.encoder_norm(x)), lengths)
        return HubertOutput(hidden_states, counts, conv)

    def extract_features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Return all hidden states, ``num_layers + 1`` of ``(B, T, D)``, and their lengths ``(B,)``, unmasked."""
        output = self(wavs, num_samples)
        return output.hidden_states, output.num_frames

    def _run_blocks(self, x: Tensor, lengths: Lengths) -> list[Tensor]:
        hidden_states = [x]
        drop = self.config.layer_drop if self.training else 0.0
        skips = (torch.rand(len(self.blocks)) < drop).tolist() if drop else [False] * len(self.blocks)
        for block, skip in zip(self.blocks, skips, strict=True):
            if not skip:
                x, _ = block(x, lengths)
            hidden_states.append(x)
        return hidden_states

    @property
    def look_ahead_ms(self) -> float:
        """Future audio, in ms beyond a frame's own window, that its output depends on; infinite for whole utterances.

        A frame's own window is the front end's receptive field: 25 ms that begin with the frame.
        """
        if self._unbounded:
            return math.inf
        frames = 0 if self.position is None else self.position.look_ahead_frames
        return 1000.0 * frames * self.config.downsample_rate / SAMPLE_RATE

    @property
    def look_ahead(self) -> str:
        """``look_ahead_ms`` in words, with what makes it unbounded."""
        return f"unbounded ({', '.join(self._unbounded)})" if self._unbounded else f"{self.look_ahead_ms:g} ms"

    @property
    def _unbounded(self) -> list[str]:
        """What lets an output see its whole utterance."""
        config, reasons = self.config, []
        if config.front_end == "conv_group":
            reasons.append("GroupNorm over time")
        if not MIXERS[config.mixer].causal or config.block == "macaron":
            reasons.append("both directions of time")
        return reasons


def _build_block(config: HubertConfig) -> nn.Module:
    if config.mixer not in MIXERS:
        raise ValueError(f"mixer: {config.mixer!r} is not one of: {' '.join(MIXERS)}")
    options = {name: getattr(config, name) for name in MIXERS[config.mixer].options}
    shared = (config.embed_dim, config.mixer, options, config.ffn_dim)
    dropouts = (config.dropout, config.activation_dropout)
    if config.block == "plain":
        return EncoderBlock(*shared, config.norm, *dropouts)
    if config.block == "macaron":
        return MacaronBlock(*shared, config.conv_module_kernel, *dropouts)
    raise ValueError(f"block: {config.block!r} is not one of: plain macaron")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
