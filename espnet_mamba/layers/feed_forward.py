"""The position-wise feed-forward network of a Transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.attention import init_linear

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu}


class FeedForward(nn.Module):
    """``W2 Drop(act(W1 x))``, act GELU as in HuBERT or SiLU (Swish) as in the Conformer."""

    def __init__(self, embed_dim: int, inner_dim: int, dropout: float = 0.0, activation: str = "gelu") -> None:
        super().__init__()
        self.up = nn.Linear(embed_dim, inner_dim)
        self.down = nn.Linear(inner_dim, embed_dim)
        init_linear(self.up, self.down)
        self.dropout = nn.Dropout(dropout)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``, each frame by itself."""
        return self.down(self.dropout(self.activation(self.up(x))))
