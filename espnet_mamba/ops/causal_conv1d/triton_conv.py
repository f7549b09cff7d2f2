"""Depthwise causal convolution with SiLU on a GPU: Triton kernels, forward and backward.

Importing this module raises ImportError where triton is missing. One program has a block of channels of one utterance
over one or several tiles of frames. A frame's ``WIDTH - 1`` neighbours are read again from the cache rather than shared
between threads. Every offset that grows with B, T or E is 64-bit, and nothing is added atomically. Tiles were chosen by
compiling for compute capability 9.0; no GPU was timed.

Letters: B utterances, T frames, E channels, W kernel width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_WIDTH, MAX_WIDTH = 2, 8
BLOCK_T = 16
BLOCK_E = 64
NUM_WARPS = 4
MAX_SPANS = 64  # of an utterance: each leaves one partial sum of the weight's gradient


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _block(E, BLOCK_E: tl.constexpr):
    """This program's place: a 64-bit number along utterances and time, and its channels."""
    program = tl.program_id(0).to(tl.int64)
    num_blocks = (E + BLOCK_E - 1) // BLOCK_E
    return program // num_blocks, (program % num_blocks).to(tl.int32) * BLOCK_E + tl.arange(0, BLOCK_E)


@triton.jit
def _frames(x, state, b, t, e, length, x_b, x_t, E, WIDTH: tl.constexpr, REVERSE: tl.constexpr):
    """Rows ``t`` of the utterance in float32; rows outside it come from the state, in time order, or are 0."""
    has_e = (e < E)[None, :]
    inside = (t >= 0) & (t < length)
    rows = tl.load(x + b * x_b + (t * x_t)[:, None] + e[None, :], mask=inside[:, None] & has_e, other=0.0).to(
        tl.float32
    )
    if state is not None:
        if REVERSE:
            j = t - length
        else:
            j = t + (WIDTH - 1)
        kept = (~inside) & (j >= 0) & (j < WIDTH - 1)
        where = state + (b * (WIDTH - 1) + j)[:, None] * E + e[None, :]
        rows += tl.load(where, mask=kept[:, None] & has_e, other=0.0).to(tl.float32)
    return rows


@triton.jit(do_not_specialize=["T"])
def conv_forward(  # noqa: D103
    x,  # (B, T, E), strides below
    weight,  # (E, W) contiguous
    bias,  # (E,)
    lengths,  # (B,)
    state,  # (B, W - 1, E) contiguous
    y,  # (B, T, E) contiguous
    x_b,
    x_t,
    T,
    E,
    WIDTH: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile, e = _block(E, BLOCK_E)
    num_tiles = (T + BLOCK_T - 1) // BLOCK_T
    b = tile // num_tiles
    t = (tile % num_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    has_e = e < E
    if lengths is None:
        length = T
    else:
        length = tl.load(lengths + b)
    total = tl.full([BLOCK_T, BLOCK_E], 0.0, tl.float32)
    if bias is not None:
        total += tl.load(bias + e, mask=has_e, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(WIDTH):
        tap = tl.load(weight + e * WIDTH + k, mask=has_e, other=0.0).to(tl.float32)
        if REVERSE:
            seen = t + (WIDTH - 1 - k)
        else:
            seen = t - (WIDTH - 1 - k)
        total += tap[None, :] * _frames(x, state, b, seen, e, length, x_b, x_t, E, WIDTH, REVERSE)
    out = tl.where((t < length)[:, None], total * _sigmoid(total), 0.0)
    tl.store(y + (b * T * E + t * E)[:, None] + e[None, :], out, mask=(t < T)[:, None] & has_e[None, :])


@triton.jit(do_not_specialize=["T", "num_spans", "tiles_per_span"])
def conv_backward(  # noqa: D103, PLR0915
    x,
    weight,
    bias,
    lengths,
    state,
    grad_y,  # (B, T, E), strides below
    grad_x,  # (B, T, E), strides below
    grad_state,  # (B, W - 1, E) contiguous
    part_weight,  # (B * num_spans, E, W)
    part_bias,  # (B * num_spans, E)
    x_b,
    x_t,
    gy_b,
    gy_t,
    gx_b,
    gx_t,
    T,
    E,
    num_spans,
    tiles_per_span,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,  # WIDTH rounded up to a power of two
    REVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    span, e = _block(E, BLOCK_E)
    b = span // num_spans
    has_e = e < E
    if lengths is None:
        length = T
    else:
        length = tl.load(lengths + b)
    taps = tl.arange(0, PADDED)
    sum_weight = tl.full([BLOCK_E, PADDED], 0.0, tl.float32)
    sum_bias = tl.full([BLOCK_E], 0.0, tl.float32)
    offset = tl.full([BLOCK_E], 0.0, tl.float32)
    if bias is not None:
        offset = tl.load(bias + e, mask=has_e, other=0.0).to(tl.float32)
    # Frames whose gradient is computed here; before frame 0 stand the state's.
    start = (span % num_spans) * tiles_per_span * BLOCK_T
    if state is not None:
        if not REVERSE:
            start = start - (WIDTH - 1)
    for tile in range(0, tiles_per_span):
        f = start + tile * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        grad = tl.full([BLOCK_T, BLOCK_E], 0.0, tl.float32)
        present = _frames(x, state, b, f, e, length, x_b, x_t, E, WIDTH, REVERSE)
        # Frame f is seen by the outputs t at distance 0 .. W - 1 after it (before it in reverse). Offsets from f are
        # summed at compile time, so that the same frame is loaded once for all of them.
        for distance in tl.static_range(WIDTH):
            if REVERSE:
                t = f - distance
            else:
                t = f + distance
            here = ((t >= 0) & (t < length))[:, None] & has_e[None, :]
            total = tl.full([BLOCK_T, BLOCK_E], 0.0, tl.float32) + offset[None, :]
            for k in tl.static_range(WIDTH):
                tap = tl.load(weight + e * WIDTH + k, mask=has_e, other=0.0).to(tl.float32)
                if REVERSE:
                    seen = f + (WIDTH - 1 - k - distance)
                else:
                    seen = f - (WIDTH - 1 - k - distance)
                total += tap[None, :] * _frames(x, state, b, seen, e, length, x_b, x_t, E, WIDTH, REVERSE)
            open_ = _sigmoid(total)
            grad_out = tl.load(grad_y + b * gy_b + (t * gy_t)[:, None] + e[None, :], mask=here, other=0.0).to(
                tl.float32
            )
            grad_out *= open_ * (1.0 + total * (1.0 - open_))
            tap = tl.load(weight + e * WIDTH + (WIDTH - 1 - distance), mask=has_e, other=0.0).to(tl.float32)
            grad += tap[None, :] * grad_out
            row = tl.sum(grad_out * present, axis=0)
            sum_weight += tl.where((taps == WIDTH - 1 - distance)[None, :], row[:, None], 0.0)
            if distance == 0:
                sum_bias += tl.sum(grad_out, axis=0)
        # past the utterance's end no output sees x, only the state that stands there in reverse
        own = tl.where((f < length)[:, None], grad, 0.0)
        inside = ((f >= 0) & (f < T))[:, None] & has_e[None, :]
        tl.store(grad_x + b * gx_b + (f * gx_t)[:, None] + e[None, :], own, mask=inside)
        if state is not None:
            if REVERSE:
                j = f - length
            else:
                j = f + (WIDTH - 1)
            kept = ((j >= 0) & (j < WIDTH - 1))[:, None] & has_e[None, :]
            tl.store(grad_state + (b * (WIDTH - 1) + j)[:, None] * E + e[None, :], grad, mask=kept)
    where = part_weight + (span * E + e)[:, None] * WIDTH + taps[None, :]
    tl.store(where, sum_weight, mask=has_e[:, None] & (taps < WIDTH)[None, :])
    if part_bias is not None:
        tl.store(part_bias + span * E + e, sum_bias, mask=has_e)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Tensor | None, reverse: bool, state: Tensor | None
) -> Tensor:
    """Return ``SiLU(bias + sum_k weight[:, k] x[t - (W - 1) + k])``, 0 in the padding.

    Args:
        x: ``(B, T, E)``.
        weight: ``(E, W)``, W from ``MIN_WIDTH`` to ``MAX_WIDTH``.
        bias: ``(E,)``.
        lengths: ``(B,)``; x is not read past them.
        reverse: see the ``W - 1`` frames after the present one instead.
        state: ``(B, W - 1, E)``, the frames before frame 0, or, reversed, after the last valid one; zeros when absent.

    Returns:
        ``(B, T, E)`` in x's type.

    Raises:
        ValueError: W out of range.
    """
    x, weight, state = _checked(x, weight, state)
    num_utterances, num_frames, num_channels = x.shape
    y = x.new_empty(x.shape)
    programs = num_utterances * triton.cdiv(num_frames, BLOCK_T) * triton.cdiv(num_channels, BLOCK_E)
    with _on(x):
        conv_forward[(programs,)](
            x,
            weight,
            bias,
            lengths,
            state,
            y,
            x.stride(0),
            x.stride(1),
            num_frames,
            num_channels,
            WIDTH=weight.shape[1],
            REVERSE=reverse,
            BLOCK_T=BLOCK_T,
            BLOCK_E=BLOCK_E,
            num_warps=NUM_WARPS,
        )
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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight, bias and state, in their types; the same bits every time.

    Args:
        x, weight, bias, lengths, reverse, state: as for ``forward``.
        grad_y: ``(B, T, E)``.
        grad_x: where to write x's gradient (any strides, channels contiguous), or None.

    Raises:
        ValueError: W out of range.
    """
    given = state
    x, weight, state = _checked(x, weight, state)
    num_utterances, num_frames, num_channels = x.shape
    width = weight.shape[1]
    grad_y = _rows(grad_y)
    grad_x = x.new_empty(x.shape) if grad_x is None else grad_x
    tiles = triton.cdiv(num_frames + (0 if state is None else width - 1), BLOCK_T)
    tiles_per_span = triton.cdiv(tiles, MAX_SPANS)
    num_spans = triton.cdiv(tiles, tiles_per_span)
    rows = num_utterances * num_spans
    part_weight = x.new_empty((rows, num_channels, width), dtype=torch.float32)
    part_bias = None if bias is None else x.new_empty((rows, num_channels), dtype=torch.float32)
    grad_state = None if state is None else torch.empty_like(state)
    with _on(x):
        conv_backward[(rows * triton.cdiv(num_channels, BLOCK_E),)](
            x,
            weight,
            bias,
            lengths,
            state,
            grad_y,
            grad_x,
            grad_state,
            part_weight,
            part_bias,
            x.stride(0),
            x.stride(1),
            grad_y.stride(0),
            grad_y.stride(1),
            grad_x.stride(0),
            grad_x.stride(1),
            num_frames,
            num_channels,
            num_spans,
            tiles_per_span,
            WIDTH=width,
            PADDED=triton.next_power_of_2(width),
            REVERSE=reverse,
            BLOCK_T=BLOCK_T,
            BLOCK_E=BLOCK_E,
            num_warps=NUM_WARPS,
        )
    grad_weight = part_weight.sum(0).to(weight.dtype)
    grad_bias = None if bias is None else part_bias.sum(0).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None if given is None else grad_state.to(given.dtype)


def _checked(x: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the arguments as the kernels read them."""
    if not MIN_WIDTH <= weight.shape[1] <= MAX_WIDTH:
        raise ValueError(f"triton: kernels of {MIN_WIDTH} to {MAX_WIDTH} taps, got {weight.shape[1]}")
    return _rows(x), weight.contiguous(), None if state is None else state.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
