"""The convolution in plain PyTorch, the definition that every other backend is tested against.

Letters: B utterances, T frames, E channels, W kernel width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.padding import padding_mask


def conv_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    state: Tensor | None,
) -> Tensor:
    """Return ``SiLU(bias + sum_k weight[:, k] x[t - (W - 1) + k])``, 0 in the padding; see ``causal_conv1d``."""
    context = with_state(x, lengths, reverse, state, weight.shape[1])
    if reverse:
        weight = weight.flip(1)
    y = F.conv1d(context.transpose(1, 2), weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    padding = padding_mask(lengths, x.shape[1])
    y = F.silu(y)
    return y if padding is None else y.masked_fill(padding, 0.0)


def with_state(x: Tensor, lengths: Tensor | None, reverse: bool, state: Tensor | None, width: int) -> Tensor:
    """Return the valid frames with the ``W - 1`` frames of the state where they belong, ``(B, T + W - 1, E)``.

    Forward the state stands before frame 0; reversed, behind each utterance's last valid frame, and then zeros.
    """
    padding = padding_mask(lengths, x.shape[1])
    if padding is not None:  # masked_fill, not multiplication: NaN in the padding must not come through
        x = x.masked_fill(padding, 0.0)
    if state is None:
        return F.pad(x, (0, 0, 0, width - 1) if reverse else (0, 0, width - 1, 0))
    if not reverse:
        return torch.cat([state.to(x.dtype), x], dim=1)
    index = _end_frames(x, lengths, width)
    return F.pad(x, (0, 0, 0, width - 1)).scatter(1, index, state.to(x.dtype))


def next_state(x: Tensor, lengths: Tensor | None, reverse: bool, state: Tensor | None, width: int) -> Tensor:
    """Return the ``W - 1`` frames that the next call's state holds, ``(B, W - 1, E)`` in time order.

    Forward these are the last valid frames, reversed the first ones; where an utterance is shorter, the old state's.
    """
    context = with_state(x, lengths, reverse, state, width)
    if reverse:
        return context[:, : width - 1]
    return context.gather(1, _end_frames(x, lengths, width))  # in context, frame t stands at t + W - 1


def _end_frames(x: Tensor, lengths: Tensor | None, width: int) -> Tensor:
    """Return the indices of the ``W - 1`` frames from each utterance's end, ``(B, W - 1, E)``."""
    ends = x.new_full((len(x),), x.shape[1], dtype=torch.long) if lengths is None else lengths
    index = ends[:, None] + torch.arange(width - 1, device=x.device)
    return index[..., None].expand(-1, -1, x.shape[2])
