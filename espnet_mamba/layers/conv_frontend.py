"""HuBERT's convolutional front end over raw audio, with statistics that padding cannot reach (docs/papers.md 1).

Letters: B utterances, S samples at 16 kHz, T frames at 50 Hz, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.packing import slot_samples

NORMS = ("conv_group", "conv_layer")


def num_conv_frames(num_samples: Tensor | int, conv_layers: Sequence[Sequence[int]]) -> Tensor | int:
    """Return the output length of unpadded convolutions ``(channels, kernel, stride)`` for ``num_samples`` samples."""
    for _, kernel, stride in conv_layers:
        num_samples = (num_samples - kernel) // stride + 1
    return num_samples


class ConvFrontEnd(nn.Module):
    """A stack of ``Conv1d`` without bias or padding, GELU after each.

    ``conv_group`` normalises each channel of the first layer over the whole utterance, as HuBERT does: nothing is
    causal after it. ``conv_layer`` normalises each frame over its channels after every layer: causal.
    """

    def __init__(self, conv_layers: Sequence[Sequence[int]], norm: str = "conv_group") -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"front_end: {norm!r} is not one of: {' '.join(NORMS)}")
        self.conv_layers = [tuple(layer) for layer in conv_layers]
        channels = [1] + [layer[0] for layer in self.conv_layers]
        self.convs = nn.ModuleList(
            nn.Conv1d(inner, outer, kernel, stride, bias=False)
            for inner, (outer, kernel, stride) in zip(channels[:-1], self.conv_layers, strict=True)
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)
        if norm == "conv_group":
            self.norms = nn.ModuleList([UtteranceNorm(channels[1])])
        else:
            self.norms = nn.ModuleList(ChannelNorm(width) for width in channels[1:])

    def forward(self, wavs: Tensor, num_samples: Tensor | None = None) -> Tensor:
        """Turn ``wavs (B, S)`` into ``(B, T, C)``; ``num_samples (B,)`` is None when nothing is padded."""
        x = wavs[:, None]
        length = num_samples
        for index, (conv, layer) in enumerate(zip(self.convs, self.conv_layers, strict=True)):
            x = conv(x)
            length = None if length is None else num_conv_frames(length, [layer]).clamp(min=0)
            if index < len(self.norms):
                x = self.norms[index](x, length)
            x = F.gelu(x)
        return x.transpose(1, 2)

    def forward_packed(self, row: Tensor, num_samples: Tensor) -> Tensor:
        """Turn a row of audio ``(1, S)`` (``pack_waveforms``) into ``(1, F, C)``, its utterances' frames in order.

        Windows over a border are computed and thrown away: less than two per utterance.
        """
        rate = math.prod(stride for _, _, stride in self.conv_layers)
        slots = slot_samples(num_samples, rate)
        begins, lengths, step = slots.cumsum(0) - slots, num_samples, 1
        x = row[:, None]
        for index, (conv, layer) in enumerate(zip(self.convs, self.conv_layers, strict=True)):
            x = conv(x)
            lengths, step = num_conv_frames(lengths, [layer]).clamp(min=0), step * layer[2]
            if index < len(self.norms):
                x = self._norm_packed(self.norms[index], x, (begins // step).tolist(), lengths.tolist())
            x = F.gelu(x)
        spans = zip((begins // rate).tolist(), lengths.tolist(), strict=True)
        return torch.cat([x[:, :, begin : begin + length] for begin, length in spans], dim=2).transpose(1, 2)

    @staticmethod
    def _norm_packed(norm: nn.Module, x: Tensor, begins: list[int], lengths: list[int]) -> Tensor:
        if isinstance(norm, ChannelNorm):  # no frame meets another
            return norm(x)
        y = torch.zeros_like(x)
        for begin, length in zip(begins, lengths, strict=True):
            if length:
                y[:, :, begin : begin + length] = norm(x[:, :, begin : begin + length])
        return y


class UtteranceNorm(nn.Module):
    """Group norm with one group per channel: mean and variance over an utterance's own valid frames, in float32."""

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.weight._no_weight_decay = True
        self.eps = eps

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalise ``x (B, C, T)``; frames from ``lengths (B,)`` on are set to zero."""
        if lengths is None:
            return F.group_norm(x.float(), x.shape[1], self.weight, self.bias, self.eps).to(x.dtype)
        keep = (torch.arange(x.shape[2], device=x.device) < lengths[:, None])[:, None]
        values = x.float().masked_fill(~keep, 0.0)
        count = lengths[:, None, None].clamp(min=1).float()
        mean = values.sum(2, keepdim=True) / count
        centred = (values - mean).masked_fill(~keep, 0.0)
        variance = centred.square().sum(2, keepdim=True) / count
        y = centred * torch.rsqrt(variance + self.eps) * self.weight[:, None] + self.bias[:, None]
        return y.masked_fill(~keep, 0.0).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each frame of ``(B, C, T)``."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Normalise ``x (B, C, T)``; no frame meets another, so ``lengths`` is not needed."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)
