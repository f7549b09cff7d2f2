"""``causal_conv1d``: one function, one meaning, several backends. Arguments are checked and converted here, once."""

from __future__ import annotations

from torch import Tensor

from espnet_mamba.ops.causal_conv1d.backends import run_backend
from espnet_mamba.ops.causal_conv1d.torch_conv import next_state
from espnet_mamba.ops.padding import checked_lengths

NAME = "causal_conv1d"


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    state: Tensor | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own kernel over the present and the ``W - 1`` frames before it, then SiLU.

    Args:
        x: input ``(B, T, E)``.
        weight: kernels ``(E, W)``; the last tap meets the present frame.
        bias: ``(E,)``.
        lengths: valid frames ``(B,)``, 0 to T; later frames are never read and their output is 0.
        reverse: look at the ``W - 1`` frames after the present one instead.
        state: the input frames just outside, ``(B, W - 1, E)`` in time order: those before frame 0, or, with
            ``reverse``, those after the utterance's last valid frame; zeros when absent.
        return_state: also return the state with which the next chunk goes on, ``(B, W - 1, E)``.
        backend: ``auto`` (by device and by what is installed) or one of ``BACKENDS``.

    Returns:
        ``(B, T, E)`` in x's type, and the state if asked for.

    Raises:
        ValueError: unknown backend; shapes, types, devices or lengths that do not fit.
    """
    _check(x, weight, bias, state)
    lengths = checked_lengths(NAME, lengths, x)
    y = x * 1 if x.numel() == 0 else run_backend(backend, (x, weight, bias, lengths, reverse, state)).to(x.dtype)
    return (y, next_state(x, lengths, reverse, state, weight.shape[1])) if return_state else y


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> None:
    """Raise ValueError, one line that names the argument, what was given and what is expected."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"{NAME}: x is {x.dtype} {tuple(x.shape)}, expected floats of shape (B, T, E)")
    num_utterances, _, num_channels = x.shape
    if weight.dim() != 2 or weight.shape[0] != num_channels or weight.shape[1] == 0:
        raise ValueError(f"{NAME}: weight has shape {tuple(weight.shape)}, expected ({num_channels}, W)")
    before = (num_utterances, weight.shape[1] - 1, num_channels)
    wanted = {"weight": (weight, tuple(weight.shape)), "bias": (bias, (num_channels,)), "state": (state, before)}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{NAME}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{NAME}: {name} is {tensor.dtype}, expected floats")
        if tensor.device != x.device:
            raise ValueError(f"{NAME}: {name} is on {tensor.device}, expected {x.device}, where x is")
