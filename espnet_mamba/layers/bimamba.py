"""ExtBiMamba: two Mambas with weights of their own, one per direction of time (paper 2; docs/papers.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from espnet_mamba.layers.mamba import Mamba
from espnet_mamba.layers.packing import Lengths

JOINS = ("sum", "concat_linear")


class ExtBiMamba(nn.Module):
    """``y = M_f(x) + R M_b(R x)``, R reversing each utterance over its own length, not over the padding.

    ``join="sum"`` is paper 2's released code, ``"concat_linear"`` is paper 1's ``W [M_f(x) ; R M_b(R x)] + b``.
    """

    def __init__(
        self,
        embed_dim: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        join: str = "sum",
        dt_init: str = "mamba",
    ) -> None:
        super().__init__()
        if join not in JOINS:
            raise ValueError(f"join: {join!r} is not one of: {' '.join(JOINS)}")
        shape = (embed_dim, state_size, conv_kernel, expand)
        self.forward_mamba = Mamba(*shape, reverse=False, dt_init=dt_init)
        self.backward_mamba = Mamba(*shape, reverse=True, dt_init=dt_init)
        self.join = nn.Linear(2 * embed_dim, embed_dim) if join == "concat_linear" else None

    def forward(self, x: Tensor, lengths: Lengths = None, state: None = None) -> tuple[Tensor, None]:
        """Mix ``x (B, T, D)`` over both directions; ``lengths`` as in ``Mamba``. No state: it needs the future.

        Raises:
            ValueError: a state is given.
        """
        if state is not None:
            raise ValueError("ExtBiMamba reads the whole utterance and cannot run in chunks; use a causal model")
        ahead, _ = self.forward_mamba(x, lengths)
        back, _ = self.backward_mamba(x, lengths)
        if self.join is None:
            return ahead + back, None
        y = self.join(torch.cat([ahead, back], dim=-1))
        if isinstance(lengths, Tensor):  # the bias would fill the padding
            keep = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
            y = y * keep[..., None]
        return y, None
