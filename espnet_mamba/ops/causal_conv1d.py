"""Depthwise causal convolution over time with SiLU, aware of padding, direction and state.

Letters: B utterances, T frames, E channels, W kernel width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.selective_scan import padding_mask


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own kernel over the present and the ``W - 1`` frames before it, then SiLU.

    Args:
        x: input ``(B, T, E)``.
        weight: kernels ``(E, W)``; the last tap meets the present frame.
        bias: ``(E,)``.
        lengths: valid frames ``(B,)``; later frames are never read and their output is 0.
        reverse: look at the ``W - 1`` frames after the present one instead.
        state: the ``W - 1`` input frames before frame 0, ``(B, W - 1, E)``; zeros when absent. Forward only.
        return_state: also return the last ``W - 1`` valid input frames, ``(B, W - 1, E)``.

    Returns:
        ``(B, T, E)``, and the state if asked for.

    Raises:
        ValueError: a state is given or asked for together with ``reverse``.
    """
    width = weight.shape[1]
    if reverse and (state is not None or return_state):
        raise ValueError("causal_conv1d: state is for the forward direction only; a reversed scan has no past to keep")
    padding = padding_mask(lengths, x.shape[1])
    if padding is not None:
        x = x.masked_fill(padding[..., None], 0.0)
    if reverse:
        context = F.pad(x, (0, 0, 0, width - 1))
        weight = weight.flip(1)
    elif state is None:
        context = F.pad(x, (0, 0, width - 1, 0))
    else:
        context = torch.cat([state.to(x.dtype), x], dim=1)
    y = F.conv1d(context.transpose(1, 2), weight[:, None], bias, groups=weight.shape[0]).transpose(1, 2)
    y = F.silu(y)
    if padding is not None:
        y = y.masked_fill(padding[..., None], 0.0)
    if not return_state:
        return y
    ends = torch.full_like(x[:, 0, 0], x.shape[1], dtype=torch.long) if lengths is None else lengths.long()
    index = ends[:, None] + torch.arange(width - 1, device=x.device)  # in context, frame t stands at t + W - 1
    return y, context.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
