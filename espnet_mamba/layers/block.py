"""An encoder block: a mixer over time, an optional feed-forward network, residuals, norms; and the table of mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.feed_forward import FeedForward
from espnet_mamba.layers.innbimamba import InnBiMamba
from espnet_mamba.layers.mamba import Mamba

# name -> builder, whether it is causal. A new mixer is one file and one line here; tests run over the table.
MIXERS: dict[str, tuple[Callable[..., nn.Module], bool]] = {
    "mamba": (Mamba, True),
    "extbimamba": (ExtBiMamba, False),
    "innbimamba": (InnBiMamba, False),
}


class EncoderBlock(nn.Module):
    """Post-norm, as every model of paper 2: ``x <- LN(x + Drop(mixer(x)))``, then the same for the feed-forward part.

    ``norm="pre"`` gives ``x <- x + Drop(mixer(LN x))`` instead.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: str,
        mixer_options: dict[str, Any],
        ffn_dim: int = 0,
        norm: str = "post",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer: {mixer!r} is not one of: {' '.join(MIXERS)}")
        if norm not in ("post", "pre"):
            raise ValueError(f"norm: {norm!r} is not one of: post pre")
        self.pre_norm = norm == "pre"
        self.mixer = MIXERS[mixer][0](embed_dim, **mixer_options)
        self.mixer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim) if ffn_dim else None
        self.ffn_norm = nn.LayerNorm(embed_dim) if ffn_dim else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: Any = None) -> tuple[Tensor, Any]:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``lengths (B,)`` and ``state`` go to the mixer."""
        mixed, state = self.mixer(self.mixer_norm(x) if self.pre_norm else x, lengths, state)
        x = x + self.dropout(mixed)
        if not self.pre_norm:
            x = self.mixer_norm(x)
        if self.ffn is not None:
            if self.pre_norm:
                x = x + self.dropout(self.ffn(self.ffn_norm(x)))
            else:
                x = self.ffn_norm(x + self.dropout(self.ffn(x)))
        return x, state
