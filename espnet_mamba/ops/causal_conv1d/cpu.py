"""The convolution with its SiLU in C (``csrc/causal_conv1d.c``), float32, kernels of 2 to 8 taps.

Letters: B utterances, T frames, E channels, W kernel width.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from espnet_mamba.ops import compiled

_FLOAT = {"dtype": torch.float32, "device": "cpu"}  # what the library writes, whatever torch's defaults are


class _Frames(ctypes.Structure):  # both mirror csrc/causal_conv1d.c
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64)]


class _Conv(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "frames", "channels", "width", "reverse", "threads")),
        ("lengths", ctypes.c_void_p),
        *((name, _Frames) for name in ("x", "y", "grad_y", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "state", "grad_weight", "grad_bias", "grad_state")),
    ]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    state: Tensor | None,
    variant: str | None = None,
) -> Tensor:
    """Return ``SiLU(bias + sum_k weight[:, k] x[t - (W - 1) + k])``, 0 in the padding; see ``causal_conv1d``.

    Args:
        x: ``(B, T, E)`` float32, channels next to each other; else it is copied first.
        weight: ``(E, W)``.
        bias: ``(E,)``.
        lengths: ``(B,)`` int64.
        reverse: from each utterance's last valid frame to frame 0.
        state: ``(B, W - 1, E)``, the frames before the first scanned one, in time order.
        variant: instruction set, a key of ``compiled.VARIANTS``; the best one if None.

    Raises:
        MemoryError: none for the kernel's working space.
        RuntimeError: there are no compiled kernels.
    """
    y = torch.empty(x.shape, **_FLOAT)
    held = _readable(x, weight, bias, lengths, state)
    conv = _describe(held, reverse)
    conv.y = _frames(y)
    _call(_library(variant).conv_forward, conv)
    return y


def backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    state: Tensor | None,
    grad_y: Tensor,
    grad_x: Tensor | None,
    variant: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of ``x``, ``weight``, ``bias`` and ``state``; the first is written to ``grad_x`` if given.

    Raises:
        MemoryError: none for the kernel's working space.
        RuntimeError: there are no compiled kernels.
    """
    held = _readable(x, weight, bias, lengths, state)
    grad_y = _unit_stride(grad_y.float())
    if grad_x is None:
        grad_x = torch.empty(x.shape, **_FLOAT)
    grad_weight = torch.empty(weight.shape[1], weight.shape[0], **_FLOAT)
    grad_bias = None if bias is None else torch.empty(bias.shape, **_FLOAT)
    grad_state = None if state is None else torch.zeros(state.shape, **_FLOAT)
    conv = _describe(held, reverse)
    conv.grad_y, conv.grad_x = _frames(grad_y), _frames(grad_x)
    conv.grad_weight, conv.grad_bias, conv.grad_state = map(_address, (grad_weight, grad_bias, grad_state))
    _call(_library(variant).conv_backward, conv)
    return grad_x, grad_weight.t().contiguous(), grad_bias, grad_state


@functools.cache
def _library(variant: str | None) -> ctypes.CDLL:
    library = compiled.library(variant)
    if library is None:
        raise RuntimeError(f"causal_conv1d: no compiled kernels ({compiled.unavailable_reason()})")
    for function in (library.conv_forward, library.conv_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Conv)], ctypes.c_int
    return library


def _readable(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the arguments as the library reads them: unit channel stride, the rest contiguous, weights by tap."""
    contiguous = (None if v is None else v.contiguous() for v in (bias, lengths, state))
    return _unit_stride(x), weight.t().contiguous(), *contiguous


def _describe(held: tuple[Tensor | None, ...], reverse: bool) -> _Conv:
    """Return the library's struct, which points into the tensors of ``held``: keep them alive."""
    x, weight, bias, lengths, state = held
    conv = _Conv(*x.shape, len(weight), reverse, torch.get_num_threads(), _address(lengths), _frames(x))
    conv.weight, conv.bias, conv.state = _address(weight), _address(bias), _address(state)
    return conv


def _unit_stride(frames: Tensor) -> Tensor:
    return frames if frames.stride(-1) == 1 or frames.shape[-1] == 1 else frames.contiguous()


def _frames(tensor: Tensor) -> _Frames:
    return _Frames(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(function: ctypes._CFuncPtr, conv: _Conv) -> None:
    if function(ctypes.byref(conv)):
        raise MemoryError("causal_conv1d: no memory for the kernel's working space")
