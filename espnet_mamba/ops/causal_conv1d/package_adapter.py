"""The causal-conv1d package's CUDA kernel behind our semantics, for those who have built it.

The kernel knows neither lengths nor direction: padding is masked before and after it, and a reversed direction is
handed to it as utterances flipped within their lengths, which costs copies. Imported on first use only.

Letters: B utterances, T frames, E channels, W kernel width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MODULE = "causal_conv1d"
WIDTHS = range(2, 5)  # taps that the kernel takes
CHANNELS = 8  # with channels as the fastest axis, which a state needs, their number is a multiple of this


def available() -> str:
    """Return why the package cannot be used, or an empty string."""
    try:
        _function()
    except Exception as error:  # a wheel built against another torch fails to load in many ways
        return f"causal_conv1d cannot be imported: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, reverse: bool, state: Tensor | None
) -> str:
    """Return why the package's kernel cannot take a call, or an empty string; arguments as for ``conv``."""
    num_channels, width = weight.shape
    if width not in WIDTHS:
        return f"causal_conv1d takes kernels of {WIDTHS[0]} to {WIDTHS[-1]} taps, given {width}"
    if state is not None and num_channels % CHANNELS:
        return f"causal_conv1d takes a state with a multiple of {CHANNELS} channels only, given {num_channels}"
    return ""


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, reverse: bool, state: Tensor | None
) -> Tensor:
    """Return ``SiLU(bias + sum_k weight[:, k] x[t - (W - 1) + k])``, 0 in the padding; differentiable by autograd.

    Args:
        x: ``(B, T, E)``.
        weight: ``(E, W)``.
        bias: ``(E,)``.
        lengths: ``(B,)``; what stands past them has no effect.
        reverse: see the ``W - 1`` frames after the present one instead.
        state: ``(B, W - 1, E)``, the frames before frame 0, or, reversed, after the last valid one; zeros when absent.

    Returns:
        ``(B, T, E)``.

    Raises:
        ImportError: the package is not there.
        ValueError: the kernel cannot take these arguments.
    """
    reason = refuses(x, weight, bias, lengths, reverse, state)
    if reason:
        raise ValueError(f"causal_conv1d: {reason}")
    padding = None
    if lengths is not None:
        padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
        x = x.masked_fill(padding, 0.0)
    order = _reversal(x, lengths) if reverse else None
    rows = _taken(x, order)
    in_place = x.shape[2] % CHANNELS == 0
    if in_place and (rows.stride(-1) != 1 or rows.stride(0) % CHANNELS or rows.stride(1) % CHANNELS):
        rows = rows.contiguous()
    columns = rows.transpose(1, 2)
    if state is not None:  # of a flipped utterance the frame after its end comes last before frame 0
        state = (state.flip(1) if reverse else state).to(x.dtype).contiguous().transpose(1, 2)
    y = _function()(
        columns if in_place else columns.contiguous(),
        weight.contiguous(),
        bias,
        initial_states=state,
        activation="silu",
    )
    y = _taken(y.transpose(1, 2), order)
    return y if padding is None else y.masked_fill(padding, 0.0)


def _reversal(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Which frame stands where when the valid part of each utterance is flipped, ``(B, T)``; its own inverse."""
    frames = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    ends = torch.full_like(frames[:, :1], x.shape[1]) if lengths is None else lengths[:, None]
    return torch.where(frames < ends, ends - 1 - frames, frames)


def _taken(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor.gather(1, order[..., None].expand_as(tensor))


def _function() -> Callable[..., Any]:
    return importlib.import_module(MODULE).causal_conv1d_fn
