"""The Conformer's convolution module, with statistics and edges that padding cannot reach.

Letters: B utterances, T frames, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.packing import Lengths, over_utterances


class ConvModule(nn.Module):
    """Pointwise to 2 D, GLU, depthwise over ``kernel`` frames, batch norm, Swish, pointwise (Gulati et al. 2020)."""

    def __init__(self, embed_dim: int, kernel: int = 31) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(
                f"conv_module_kernel: {kernel} is even; a centred convolution wants an odd number of frames"
            )
        self.pointwise_in = nn.Linear(embed_dim, 2 * embed_dim)
        self.depthwise = nn.Conv1d(embed_dim, embed_dim, kernel, padding=kernel // 2, groups=embed_dim)
        self.norm = MaskedBatchNorm(embed_dim)
        self.pointwise_out = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, lengths: Lengths = None) -> Tensor:
        """Map ``x (B, T, D)`` to ``(B, T, D)``; ``lengths`` as in ``Mamba``. Its output in the padding is not 0."""
        padding = None
        if isinstance(lengths, Tensor):
            padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            x = x.masked_fill(padding, 0.0)
        x = F.glu(self.pointwise_in(x), dim=-1)
        if padding is not None:  # the bias has filled the padding again
            x = x.masked_fill(padding, 0.0)
        x = over_utterances(lambda part, _: self.depthwise(part.transpose(1, 2)).transpose(1, 2), x, lengths)
        return self.pointwise_out(F.silu(self.norm(x, padding)))


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the valid frames of a batch ``(B, T, D)``."""

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """Normalise; ``padding (B, T, 1)`` is true where a frame is not to be counted."""
        if padding is None or not self.training:
            return super().forward(x.flatten(0, 1)).view_as(x)
        valid = ~padding[..., 0]
        y = torch.zeros_like(x)
        y[valid] = super().forward(x[valid]).to(y.dtype)
        return y
