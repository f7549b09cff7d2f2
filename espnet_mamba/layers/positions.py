"""Position by convolution: what HuBERT adds to its frames before the first block (docs/papers.md 1)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.packing import Lengths, over_utterances

POSITIONS = ("conv", "causal_conv", "none")


class PositionalConv(nn.Module):
    """``x + GELU(conv(x))``: grouped, weight-normalised, over ``kernel`` frames.

    Centred, the output at t sees t - kernel/2 ... t + kernel/2 - 1 (63 future frames for 128); causal, the last
    ``kernel`` frames only.
    """

    def __init__(self, embed_dim: int, kernel: int, groups: int, causal: bool = False) -> None:
        super().__init__()
        conv = nn.Conv1d(embed_dim, embed_dim, kernel, groups=groups)
        nn.init.normal_(conv.weight, 0.0, math.sqrt(4.0 / (kernel * embed_dim)))
        nn.init.zeros_(conv.bias)
        self.conv = nn.utils.parametrizations.weight_norm(conv, dim=2)
        self.left = kernel - 1 if causal else kernel // 2
        self.right = kernel - 1 - self.left

    @property
    def look_ahead_frames(self) -> int:
        """Number of future frames that an output depends on."""
        return self.right

    def forward(self, x: Tensor, lengths: Lengths = None) -> Tensor:
        """Add positions to ``x (B, T, D)``, whose padding must be zero: a batch mate then looks like silence's edge.

        ``lengths`` is read for packed rows only.
        """

        def convolve(part: Tensor, _: Tensor | None) -> Tensor:
            return F.gelu(self.conv(F.pad(part.transpose(1, 2), (self.left, self.right)))).transpose(1, 2)

        return x + over_utterances(convolve, x, lengths)
