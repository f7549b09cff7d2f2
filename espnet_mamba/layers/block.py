"""Encoder blocks: a mixer over time between feed-forward networks, residuals and norms; and the table of mixers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from espnet_mamba.layers.attention import CausalSelfAttention, SelfAttention
from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.conv_module import ConvModule
from espnet_mamba.layers.feed_forward import FeedForward
from espnet_mamba.layers.innbimamba import InnBiMamba
from espnet_mamba.layers.mamba import Mamba
from espnet_mamba.layers.mamba2 import Mamba2
from espnet_mamba.layers.packing import Lengths


class MixerKind(NamedTuple):
    """A line of the table of mixers."""

    build: Callable[..., nn.Module]
    causal: bool
    options: tuple[str, ...]  # keyword arguments of ``build``, which are also fields of the model's config


_MAMBA = ("state_size", "conv_kernel", "expand", "dt_init")
_ATTENTION = ("num_heads", "attention_dropout")
# A new mixer is one file and one line here; tests run over the table.
MIXERS: dict[str, MixerKind] = {
    "mamba": MixerKind(Mamba, True, _MAMBA),
    "extbimamba": MixerKind(ExtBiMamba, False, (*_MAMBA, "join")),
    "innbimamba": MixerKind(InnBiMamba, False, (*_MAMBA, "join", "share_conv")),
    "mamba2": MixerKind(Mamba2, True, ("state_size", "conv_kernel", "expand", "head_dim")),
    "attention": MixerKind(SelfAttention, False, _ATTENTION),
    "causal_attention": MixerKind(CausalSelfAttention, True, _ATTENTION),
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
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if norm not in ("post", "pre"):
            raise ValueError(f"norm: {norm!r} is not one of: post pre")
        self.pre_norm = norm == "pre"
        self.mixer = build_mixer(mixer, embed_dim, mixer_options)
        self.mixer_norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, activation_dropout) if ffn_dim else None
        self.ffn_norm = nn.LayerNorm(embed_dim) if ffn_dim else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Lengths = None, state: Any = None) -> tuple[Tensor, Any]:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``lengths`` and ``state`` go to the mixer."""
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


class MacaronBlock(nn.Module):
    """ConBiMamba (paper 1): the Conformer's block with a mixer in the place of attention (docs/papers.md 3).

    ``x + FFN(LN x) / 2``, ``x + mixer(LN x)``, ``x + conv(LN x)``, ``x + FFN(LN x) / 2``, ``LN``; Drop on each part.
    """

    def __init__(
        self,
        embed_dim: int,
        mixer: str,
        mixer_options: dict[str, Any],
        ffn_dim: int,
        conv_kernel: int = 31,
        dropout: float = 0.1,
        activation_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if ffn_dim < 1:
            raise ValueError(f"ffn_dim: {ffn_dim}; a macaron block has two feed-forward networks, give their width")
        self.ffn_in, self.ffn_out = (FeedForward(embed_dim, ffn_dim, activation_dropout, "silu") for _ in range(2))
        self.mixer = build_mixer(mixer, embed_dim, mixer_options)
        self.conv = ConvModule(embed_dim, conv_kernel)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in range(5))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Lengths = None, state: Any = None) -> tuple[Tensor, Any]:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``lengths`` as in ``Mamba``. There is no state: it needs the future.

        Raises:
            ValueError: a state is given.
        """
        if state is not None:
            raise ValueError("a macaron block reads the whole utterance and cannot run in chunks; use a causal model")
        before_ffn_in, before_mixer, before_conv, before_ffn_out, last = self.norms
        x = x + 0.5 * self.dropout(self.ffn_in(before_ffn_in(x)))
        x = x + self.dropout(self.mixer(before_mixer(x), lengths)[0])
        x = x + self.dropout(self.conv(before_conv(x), lengths))
        x = x + 0.5 * self.dropout(self.ffn_out(before_ffn_out(x)))
        return last(x), None


def build_mixer(name: str, embed_dim: int, options: dict[str, Any]) -> nn.Module:
    """Build a mixer of the table.

    Raises:
        ValueError: no such mixer, or options that it refuses.
    """
    if name not in MIXERS:
        raise ValueError(f"mixer: {name!r} is not one of: {' '.join(MIXERS)}")
    return MIXERS[name].build(embed_dim, **options)
