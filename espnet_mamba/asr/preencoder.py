"""A linear pre-encoder that also lowers the frame rate. B utterances, T frames, D width."""

from __future__ import annotations

import torch
from espnet2.asr.preencoder.abs_preencoder import AbsPreEncoder
from torch import Tensor, nn


class StackedLinear(AbsPreEncoder):
    """``preencoder: stacked_linear``: joins ``stack`` neighbouring frames and projects them to ``output_size``.

    With a stack of 2 it brings a 50 Hz upstream, and with 4 a 100 Hz filterbank, to 25 Hz, so that the same encoder
    serves both at the same cost.
    """

    def __init__(self, input_size: int, output_size: int, stack: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.stack = stack
        self.norm = nn.LayerNorm(input_size * stack)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(input_size * stack, output_size)

    def output_size(self) -> int:
        """Width of the output."""
        return self.linear.out_features

    def forward(self, input: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map (B, T, D) with lengths (B,) to (B, ceil(T/stack), output_size); frames behind an end count as zeros."""
        frames = torch.arange(input.size(1), device=input.device)
        x = input.masked_fill((frames >= input_lengths.unsqueeze(1)).unsqueeze(2), 0.0)
        x = nn.functional.pad(x, (0, 0, 0, -input.size(1) % self.stack))
        x = x.reshape(x.size(0), -1, self.stack * x.size(2))  # (B, T/stack, stack*D)
        lengths = torch.div(input_lengths + self.stack - 1, self.stack, rounding_mode="floor")
        return self.linear(self.dropout(self.norm(x))), lengths
