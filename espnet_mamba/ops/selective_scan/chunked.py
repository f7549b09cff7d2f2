"""The selective scan in plain PyTorch without a Python step per frame, for any device and float type.

Time is cut into segments small enough to hold their ``(B, T, E, N)`` states. Inside a segment the recurrence runs over
all chunks at once: one step per position in a chunk, then one per chunk, about ``2 sqrt(T)`` steps in all. Only the
states at segment starts are kept; the backward pass recomputes the rest, so memory grows with ``T * E``, not
``T * E * N``. A reversed scan takes the segments from the last to the first and flips one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.padding import padding_mask
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs

CHUNK_FRAMES = 8
# Elements of one (B, T, E, N) work array: 4 MiB in float32. On 2 cores of a Zen 4 server, 2^18 to 2^21 took the same
# time for (B, E, T, N) = (16, 256, 152, 16) and 2^22 half as much again.
SEGMENT_ELEMENTS = 1 << 20


def scan_chunked(inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return what ``scan_reference`` returns, for the same arguments; differentiable in all of them."""
    padding = padding_mask(inputs.lengths, inputs.x.shape[1])
    with torch.autocast(device_type=inputs.x.device.type, enabled=False):
        results = [_scan_direction(inputs.x, padding, d, inputs.dt_softplus) for d in inputs.directions]
        y = sum(result[0] for result in results)
        z = inputs.z if inputs.z is None or padding is None else inputs.z.masked_fill(padding, 0.0)
        if z is not None:
            y = y * F.silu(z)
        if padding is not None:
            y = y.masked_fill(padding, 0.0)
    return y, tuple(result[1] for result in results)


def _scan_direction(
    x: Tensor, padding: Tensor | None, direction: Direction, dt_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Prepare one direction: step sizes, and a step of 0, which keeps the state, in all padding."""
    dt, A, Bmat, Cmat, D_skip, dt_bias, state, reverse = direction
    if padding is not None:  # masked_fill, not multiplication: NaN in the padding must not come through
        x, dt, Bmat, Cmat = (v.masked_fill(padding, 0.0) for v in (x, dt, Bmat, Cmat))
    step = dt if dt_bias is None else dt + dt_bias
    step = F.softplus(step) if dt_softplus else step
    if padding is not None:
        step = step.masked_fill(padding, 0.0)
    if state is None:
        state = A.new_zeros(x.shape[0], *A.shape)
    num_frames = x.shape[1]
    if num_frames % CHUNK_FRAMES:
        fill = (0, 0, 0, -num_frames % CHUNK_FRAMES)
        padded = [F.pad(v, fill) for v in (x, step, Bmat, Cmat)]
        y, last = _ChunkedScan.apply(padded[0], padded[1], A, padded[2], padded[3], state, reverse)
        y = y[:, :num_frames]
    else:
        y, last = _ChunkedScan.apply(x, step, A, Bmat, Cmat, state, reverse)
    return (y if D_skip is None else y + x * D_skip), last


def linear_recurrence_(decay: Tensor, value: Tensor, reverse: bool = False) -> Tensor:
    """Overwrite ``value`` by ``h_t = decay_t h_{t-1} + value_t`` with ``h_{-1} = 0``; destroys ``decay``.

    Args:
        decay: ``(B, T, E, N)``, T a multiple of ``CHUNK_FRAMES``.
        value: ``(B, T, E, N)``.
        reverse: run from the last frame to the first, ``h_t = decay_t h_{t+1} + value_t``.

    Returns:
        ``value``.
    """
    shape = (decay.shape[0], -1, CHUNK_FRAMES, *decay.shape[2:])
    decays, values = decay.view(shape), value.view(shape)
    back = 1 if reverse else -1  # where the frame before stands
    positions, chunks = range(CHUNK_FRAMES), range(values.shape[1])
    # Every chunk from a zero state; the decays become products since the chunk's start.
    for i in list(reversed(positions))[1:] if reverse else positions[1:]:
        values[:, :, i].addcmul_(decays[:, :, i], values[:, :, i + back])
        decays[:, :, i].mul_(decays[:, :, i + back])
    end = slice(0, 1) if reverse else slice(CHUNK_FRAMES - 1, CHUNK_FRAMES)
    # Hand each chunk the state that the one before it ended with.
    for c in list(reversed(chunks))[1:] if reverse else chunks[1:]:
        values[:, c].addcmul_(decays[:, c], values[:, c + back, end])
    return value


def _states_(decay: Tensor, x: Tensor, dt: Tensor, Bmat: Tensor, state: Tensor) -> Tensor:
    """Return all states of a segment ``(B, T, E, N)`` from its decays ``exp(dt A)``, which are destroyed."""
    value = (dt * x)[..., None] * Bmat[:, :, None]
    value[:, 0].addcmul_(decay[:, 0], state)
    return linear_recurrence_(decay, value)


def _decays(dt: Tensor, A: Tensor) -> Tensor:
    return torch.mul(dt[..., None], A).exp_()


def _segment_frames(x: Tensor, num_states: int) -> int:
    per_chunk = x.shape[0] * x.shape[2] * num_states * CHUNK_FRAMES
    return CHUNK_FRAMES * max(1, SEGMENT_ELEMENTS // max(per_chunk, 1))


def _segments(num_frames: int, size: int, reverse: bool) -> list[slice]:
    """Return the segments in the order in which they are scanned."""
    parts = [slice(begin, min(begin + size, num_frames)) for begin in range(0, num_frames, size)]
    return parts[::-1] if reverse else parts


def _take(part: slice, reverse: bool, *tensors: Tensor) -> list[Tensor]:
    """Cut a segment out, in scan order."""
    return [v[:, part].flip(1) if reverse else v[:, part] for v in tensors]


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, state: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        size = _segment_frames(x, A.shape[1])
        outputs, starts = [], []
        for part in _segments(x.shape[1], size, reverse):
            starts.append(state)
            x_s, dt_s, B_s, C_s = _take(part, reverse, x, dt, Bmat, Cmat)
            states = _states_(_decays(dt_s, A), x_s, dt_s, B_s, state)
            y = torch.matmul(states, C_s[..., None]).squeeze(-1)
            outputs.append(y.flip(1) if reverse else y)
            state = states[:, -1].clone()
        ctx.save_for_backward(x, dt, A, Bmat, Cmat, *starts)
        ctx.size, ctx.reverse = size, reverse
        return torch.cat(outputs[::-1] if reverse else outputs, dim=1), state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, Bmat, Cmat, *starts = ctx.saved_tensors
        reverse, carry, grad_A = ctx.reverse, grad_state, torch.zeros_like(A)
        parts = []
        with torch.autocast(device_type=x.device.type, enabled=False):
            order = list(zip(_segments(x.shape[1], ctx.size, reverse), starts, strict=True))
            for part, start in reversed(order):
                x_s, dt_s, B_s, C_s, grad_s = _take(part, reverse, x, dt, Bmat, Cmat, grad_y)
                *grads, segment_grad_A, carry = _segment_backward(x_s, dt_s, A, B_s, C_s, start, grad_s, carry)
                grad_A += segment_grad_A
                parts.append([g.flip(1) for g in grads] if reverse else grads)
        in_time = parts if reverse else parts[::-1]
        grad_x, grad_dt, grad_B, grad_C = (torch.cat(p, dim=1) for p in zip(*in_time, strict=True))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, carry, None


def _segment_backward(
    x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, state: Tensor, grad_y: Tensor, carry: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one segment: of x, dt, Bmat, Cmat (its frames), of A, and of the state before it.

    With ``g_t = dL/dh_t = grad_y_t C_t + exp(dt_{t+1} A) g_{t+1}``, a recurrence that runs backwards in time; ``carry``
    is the gradient that reaches the segment's last state from later frames.
    """
    decay = _decays(dt, A)
    states = _states_(decay.clone(), x, dt, Bmat, state)
    grad_C = torch.matmul(grad_y[:, :, None], states).squeeze(2)
    grad = grad_y[..., None] * Cmat[:, :, None]
    grad[:, -1] += carry
    next_decay = torch.cat([decay[:, 1:], torch.ones_like(decay[:, :1])], dim=1)
    linear_recurrence_(next_decay, grad, reverse=True)

    scaled_input = dt * x
    grad_B = torch.matmul(scaled_input[:, :, None], grad).squeeze(2)
    grad_scaled_input = torch.matmul(grad, Bmat[..., None]).squeeze(-1)
    grad.mul_(decay)  # now the gradient that reaches the state one frame earlier
    carry = grad[:, 0].clone()
    grad[:, 1:].mul_(states[:, :-1])
    grad[:, 0].mul_(state)  # now the gradient of the exponent dt A
    grad_A = torch.einsum("bten,bte->en", grad, dt)
    grad_dt = grad_scaled_input * x + torch.einsum("bten,en->bte", grad, A)
    return grad_scaled_input * dt, grad_dt, grad_B, grad_C, grad_A, carry
