"""The position-wise feed-forward network of a Transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``W2 Drop(GELU(W1 x))``."""

    def __init__(self, embed_dim: int, inner_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, inner_dim)
        self.down = nn.Linear(inner_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``, each frame by itself."""
        return self.down(self.dropout(F.gelu(self.up(x))))
