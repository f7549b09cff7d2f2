"""Multi-head self-attention as a mixer, fused (scaled_dot_product_attention), with or without the future.

Letters: B utterances, T frames, D width, H heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.packing import Lengths, over_utterances

INIT_STD = 0.02  # BERT's and HuBERT's normal initialisation of linear layers


class AttentionState(NamedTuple):
    """Keys and values of all frames so far: what a causal pass in chunks carries. It grows with time."""

    keys: Tensor  # (B, H, T', D / H)
    values: Tensor  # (B, H, T', D / H)


def init_linear(*layers: nn.Linear) -> None:
    """Draw weights from N(0, 0.02) and set biases to 0, as HuBERT's Transformer does."""
    for layer in layers:
        nn.init.normal_(layer.weight, 0.0, INIT_STD)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


class SelfAttention(nn.Module):
    """HuBERT's attention: every valid frame sees every valid frame of its utterance; causal, only those before it."""

    causal = False

    def __init__(self, embed_dim: int, num_heads: int = 12, attention_dropout: float = 0.1) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} heads do not divide the width, {embed_dim}")
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(embed_dim, embed_dim) for _ in range(4))
        init_linear(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(
        self, x: Tensor, lengths: Lengths = None, state: AttentionState | None = None
    ) -> tuple[Tensor, AttentionState | None]:
        """Mix frames over time.

        Args:
            x: ``(B, T, D)``.
            lengths: valid frames ``(B,)``, or the utterances of a packed row; None when nothing is padded.
            state: what the last chunk returned, for a causal pass in unpadded chunks (``start_state`` for the first).

        Returns:
            ``(B, T, D)``, zero in the padding, and the state after the chunk if one was given.

        Raises:
            ValueError: a state for attention that needs the future, or together with ``lengths``.
        """
        if state is not None and (lengths is not None or not self.causal):
            raise ValueError("attention runs in chunks only if it is causal and nothing is padded")
        padding = None
        if isinstance(lengths, Tensor):
            padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            x = x.masked_fill(padding, 0.0)  # a weight of 0 does not silence NaN
        qkv = torch.cat([layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj)], dim=-1)
        if state is None:
            y = over_utterances(lambda part, own: self._attend(part, own, None)[0], qkv, lengths)
        else:
            y, state = self._attend(qkv, None, state)
        y = self.out_proj(y)
        return (y if padding is None else y.masked_fill(padding, 0.0)), state

    def _attend(
        self, qkv: Tensor, lengths: Tensor | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState]:
        """Attend over ``qkv (B, T, 3 D)``; returns ``(B, T, D)`` and all keys and values so far."""
        queries, keys, values = (self._heads(part) for part in qkv.chunk(3, dim=-1))
        if state is not None:
            keys, values = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
        mask = self._mask(queries, keys, lengths)
        dropout = self.attention_dropout if self.training else 0.0
        alone = self.causal and mask is None
        y = F.scaled_dot_product_attention(queries, keys, values, mask, dropout, is_causal=alone)
        return y.transpose(1, 2).flatten(2), AttentionState(keys, values)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, queries: Tensor, keys: Tensor, lengths: Tensor | None) -> Tensor | None:
        """Return which keys a query may see, or None for all (or for what ``is_causal`` says by itself)."""
        num_queries, num_keys = queries.shape[2], keys.shape[2]
        if self.causal:
            if num_keys == num_queries:  # padding stands after every frame that may be looked at
                return None
            ahead = torch.ones(num_queries, num_keys, dtype=torch.bool, device=keys.device)
            return ahead.tril(num_keys - num_queries)
        if lengths is None:
            return None
        # an empty utterance sees its first frame all the same: a softmax over nothing is NaN
        frames = torch.arange(num_keys, device=keys.device)
        return (frames < lengths.clamp(min=1)[:, None])[:, None, None]


class CausalSelfAttention(SelfAttention):
    """The same without the future."""

    causal = True

    def start_state(self, num_utterances: int) -> AttentionState:
        """Return the state before the first frame: no keys, no values."""
        weight = self.q_proj.weight
        empty = weight.new_zeros(num_utterances, self.num_heads, 0, weight.shape[0] // self.num_heads)
        return AttentionState(empty, empty)
