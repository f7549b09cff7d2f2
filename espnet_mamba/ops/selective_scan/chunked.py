"""The selective scan in plain PyTorch, for any device and float type.

Time is cut into segments whose states ``(T, B, E, N)`` fit a cache; they live in work arrays that all segments share.
Inside a segment, time comes first in memory, so that a step of the recurrence is one operation on contiguous arrays.
Only the states at segment starts are kept; the backward pass recomputes the rest, so memory grows with ``T * E``, not
``T * E * N``. A reversed scan takes the segments from the last to the first and flips one at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.ops.padding import padding_mask
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs

SEGMENT_ELEMENTS = 1 << 20  # elements of one work array: 4 MiB in float32
LONGEST_SEGMENT = 64  # frames


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
    y, last = _ChunkedScan.apply(x, step, A, Bmat, Cmat, state, reverse)
    return (y if D_skip is None else y + x * D_skip), last


def _segments(x: Tensor, num_states: int, reverse: bool) -> list[slice]:
    """Return the segments in the order in which they are scanned."""
    per_frame = max(x.shape[0] * x.shape[2] * num_states, 1)
    size = min(LONGEST_SEGMENT, max(1, SEGMENT_ELEMENTS // per_frame))
    parts = [slice(begin, min(begin + size, x.shape[1])) for begin in range(0, x.shape[1], size)]
    return parts[::-1] if reverse else parts


def _cut(part: slice, reverse: bool, *tensors: Tensor) -> list[Tensor]:
    """Cut a segment out of ``(B, T, ...)``, time first and in scan order."""
    return [(v[:, part].flip(1) if reverse else v[:, part]).transpose(0, 1) for v in tensors]


def _put(target: Tensor, part: slice, reverse: bool, segment: Tensor) -> None:
    """Write a segment ``(T, B, ...)`` where it belongs in ``(B, T, ...)``."""
    target[:, part] = (segment.flip(0) if reverse else segment).transpose(0, 1)


def _states(work: list[Tensor], x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return a segment's decays ``exp(dt A)`` ``(T, B, E, N)``, and its states with the one before ``(T + 1, ...)``."""
    decay = torch.mul(dt[..., None], A, out=work[0][: len(x)]).exp_()
    states = work[1][: len(x) + 1]
    states[0] = state
    torch.mul((dt * x)[..., None], Bmat[:, :, None], out=states[1:])
    for t in range(len(x)):
        states[t + 1].addcmul_(decay[t], states[t])
    return decay, states


def _work(parts: list[slice], state: Tensor, count: int) -> list[Tensor]:
    longest = max(part.stop - part.start for part in parts)
    return [state.new_empty(longest + 1, *state.shape) for _ in range(count)]


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, state: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        parts, starts, y = _segments(x, A.shape[1], reverse), [], x.new_empty(x.shape)
        work = _work(parts, state, 2)
        for part in parts:
            starts.append(state)
            x_s, dt_s, B_s, C_s = _cut(part, reverse, x, dt, Bmat, Cmat)
            _, states = _states(work, x_s, dt_s, A, B_s, state)
            _put(y, part, reverse, torch.matmul(states[1:], C_s[..., None]).squeeze(-1))
            state = states[-1].clone()
        ctx.save_for_backward(x, dt, A, Bmat, Cmat, *starts)
        ctx.reverse = reverse
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, Bmat, Cmat, *starts = ctx.saved_tensors
        reverse, carry, grad_A = ctx.reverse, grad_state, torch.zeros_like(A)
        grads = [torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt, Bmat, Cmat)]
        parts = _segments(x, A.shape[1], reverse)
        work = _work(parts, carry, 4)
        with torch.autocast(device_type=x.device.type, enabled=False):
            for part, start in reversed(list(zip(parts, starts, strict=True))):
                x_s, dt_s, B_s, C_s, grad_s = _cut(part, reverse, x, dt, Bmat, Cmat, grad_y)
                *of_frames, of_A, carry = _segment_backward(work, (x_s, dt_s, A, B_s, C_s), start, grad_s, carry)
                for target, segment in zip(grads, of_frames, strict=True):
                    _put(target, part, reverse, segment)
                grad_A += of_A
        grad_x, grad_dt, grad_B, grad_C = grads
        return grad_x, grad_dt, grad_A, grad_B, grad_C, carry, None


def _segment_backward(
    work: list[Tensor], inputs: tuple[Tensor, ...], state: Tensor, grad_y: Tensor, carry: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one segment: of x, dt, Bmat, Cmat (its frames), of A, and of the state before it.

    With ``g_t = dL/dh_t = grad_y_t C_t + exp(dt_{t+1} A) g_{t+1}``, a recurrence that runs backwards in time; ``carry``
    is the gradient that reaches the segment's last state from later frames.
    """
    x, dt, A, Bmat, Cmat = inputs
    decay, states = _states(work, x, dt, A, Bmat, state)
    grad = torch.mul(grad_y[..., None], Cmat[:, :, None], out=work[2][: len(x)])
    grad[-1] += carry
    for t in range(len(x) - 2, -1, -1):
        grad[t].addcmul_(decay[t + 1], grad[t + 1])
    scaled_input = dt * x
    grad_C = torch.matmul(grad_y[:, :, None], states[1:]).squeeze(2)
    grad_B = torch.matmul(scaled_input[:, :, None], grad).squeeze(2)
    grad_scaled_input = torch.matmul(grad, Bmat[..., None]).squeeze(-1)
    decay.mul_(grad)  # now the gradient that reaches the state one frame earlier
    carry = decay[0].clone()
    decay.mul_(states[:-1])  # now the gradient of the exponent dt A
    product = work[3][: len(x)]
    grad_dt = grad_scaled_input * x + torch.mul(decay, A, out=product).sum(-1)
    grad_A = torch.mul(decay, dt[..., None], out=product).sum((0, 1))
    return grad_scaled_input * dt, grad_dt, grad_B, grad_C, grad_A, carry
