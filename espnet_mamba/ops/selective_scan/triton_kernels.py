"""The Triton kernels of the selective scan; ``triton_scan`` launches them.

One program scans a block of channels of one utterance from the first frame to the last, the states in float32 registers
as a tile (BLOCK_E, STATES, LANES): state ``n`` stands at ``[:, n // LANES, n % LANES]``. The compiler hands out the
threads of a warp along the last axis first, 4 neighbouring states to a thread where memory is aligned, and then along
channels. That keeps both sums short: over states (for y) within ``LANES / 4`` threads, over channels (for the gradients
of B and C) across the other threads.

Frames are named twice: ``i`` counts in scanning order from 0 to the utterance's length, ``t`` is the frame in memory.
Offsets that grow with B, T or E are 64-bit (mamba#1015). Nothing is added atomically (mamba#493). Frames past the
utterance's length are neither read nor written.

Arguments of both kernels: the tensors of ``protocol.ScanInputs`` and ``protocol.Direction`` with their strides over
utterances (``_b``) and frames (``_t``), channels and states being neighbours; ADD: there is an earlier direction, whose
sums stand in ``total``; FINISH: this is the last direction.

Letters: B utterances, T frames, E channels, N states.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def _softplus(v):
    # log1p by Kahan's correction: a plain log(1 + u) loses the small steps, which are those that Mamba starts from.
    u = tl.exp(-tl.abs(v))
    w = 1.0 + u
    log1p = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.maximum(v, 0.0) + log1p


@triton.jit
def _load(pointer, offset, columns, mask):
    """``pointer[offset + columns]`` in float32, 0 where masked; ``offset`` is a 64-bit scalar."""
    return tl.load(pointer + offset + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _block(E, N: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr, BLOCK_E: tl.constexpr):
    """This program's block of channels and utterance, and the channels and states of its tile."""
    program = tl.program_id(0).to(tl.int64)
    num_blocks = (E + BLOCK_E - 1) // BLOCK_E
    block = program % num_blocks
    e = (block * BLOCK_E).to(tl.int32) + tl.arange(0, BLOCK_E)
    n = tl.arange(0, STATES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tile = e[:, None, None] * N + n[None, :, :]
    in_tile = (e < E)[:, None, None] & (n < N)[None, :, :]
    return block, program // num_blocks, e, n, tile, in_tile


@triton.jit
def _length(lengths, b, T):
    if lengths is None:
        length = T
    else:
        length = tl.load(lengths + b).to(tl.int32)  # counting in 64 bits costs backward 60 registers
    return length


@triton.jit
def _per_channel(pointer, e, E, BLOCK_E: tl.constexpr):
    if pointer is None:
        value = tl.full([BLOCK_E], 0.0, tl.float32)
    else:
        value = tl.load(pointer + e, mask=e < E, other=0.0)
    return value


@triton.jit
def _state(pointer, offset, tile, in_tile, BLOCK_E: tl.constexpr, STATES: tl.constexpr, LANES: tl.constexpr):
    if pointer is None:
        h = tl.full([BLOCK_E, STATES, LANES], 0.0, tl.float32)
    else:
        h = tl.load(pointer + offset + tile, mask=in_tile, other=0.0)
    return h


@triton.jit
def _inputs(
    x,
    dt,
    Bmat,
    bias,
    i,
    length,
    e,
    n,
    E,
    x_t,
    dt_t,
    B_t,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Scanning step ``i``: its frame, which channels are read, x, dt + dt_bias, the step size, B."""
    valid = i < length
    if REVERSE:
        t = length - 1 - i
    else:
        t = i
    t = t.to(tl.int64)  # i has 32 bits, t * stride may have more
    here = (e < E) & valid
    x_now = _load(x, t * x_t, e, here)
    raw = _load(dt, t * dt_t, e, here) + bias
    if SOFTPLUS:
        step = _softplus(raw)
    else:
        step = raw
    step = tl.where(valid, step, 0.0)  # a step of 0 leaves the state as it is in the frames that fill the last chunk
    return t, here, x_now, raw, step, _load(Bmat, t * B_t, n, (n < N) & valid)


@triton.jit
def _decay(step, rates):
    return tl.exp2(step[:, None, None] * (rates * LOG2_E))


@triton.jit
def _outer(per_channel, per_state):
    return per_channel[:, None, None] * per_state[None, :, :]


@triton.jit
def _sum_states(v):
    return tl.sum(tl.sum(v, axis=1), axis=1)


@triton.jit
def _with_earlier(total, offset, e, value, here, ADD: tl.constexpr):
    if ADD:
        value += tl.load(total + offset + e, mask=here, other=0.0)
    return value


@triton.jit(do_not_specialize=["T", "num_kept"])
def scan_forward(  # noqa: D103
    x,
    dt,
    z,
    A,
    Bmat,
    Cmat,
    D_skip,
    dt_bias,
    state,
    lengths,
    y,  # (B, T, E) contiguous
    total,  # (B, T, E) contiguous, float32: the sum over directions before the gate
    last,  # (B, E, N)
    kept,  # (B, num_kept, E, N): the states before scanning steps 0, SEGMENT, 2 SEGMENT ...; or None
    x_b,
    x_t,
    dt_b,
    dt_t,
    z_b,
    z_t,
    B_b,
    B_t,
    C_b,
    C_t,
    T,
    E,
    num_kept,
    N: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
):
    block, b, e, n, tile, in_tile = _block(E, N, STATES, LANES, BLOCK_E)
    rates = tl.load(A + tile, mask=in_tile, other=0.0)
    skip = _per_channel(D_skip, e, E, BLOCK_E)
    bias = _per_channel(dt_bias, e, E, BLOCK_E)
    length = _length(lengths, b, T)
    h = _state(state, b * E * N, tile, in_tile, BLOCK_E, STATES, LANES)
    x += b * x_b
    dt += b * dt_b
    Bmat += b * B_b
    Cmat += b * C_b
    for segment in range(0, (length + SEGMENT - 1) // SEGMENT):
        start = segment * SEGMENT
        if kept is not None:
            tl.store(kept + (b * num_kept + segment) * E * N + tile, h, mask=in_tile)
        for first in range(start, tl.minimum(length, start + SEGMENT), CHUNK):
            for k in tl.static_range(CHUNK):
                t, here, x_now, raw, step, b_t = _inputs(
                    x, dt, Bmat, bias, first + k, length, e, n, E, x_t, dt_t, B_t, N, SOFTPLUS, REVERSE
                )
                c_t = _load(Cmat, t * C_t, n, (n < N) & (first + k < length))
                h = _decay(step, rates) * h + _outer(step * x_now, b_t)
                row = (b * T + t) * E
                out = _with_earlier(total, row, e, _sum_states(h * c_t[None, :, :]) + skip * x_now, here, ADD)
                if FINISH:
                    if z is not None:
                        gate = _load(z, b * z_b + t * z_t, e, here)
                        out *= gate * _sigmoid(gate)
                    tl.store(y + row + e, out, mask=here)
                else:
                    tl.store(total + row + e, out, mask=here)
    tl.store(last + b * E * N + tile, h, mask=in_tile)


@triton.jit
def _through_gate(
    z, grad_z, total, at_z, at_grad_z, row, e, grad_out, out, here, ADD: tl.constexpr, FINISH: tl.constexpr
):
    """Store z's gradient, or in ``total`` what the next direction needs for it; return the gradient before the gate."""
    gate = _load(z, at_z, e, here)
    opened = _sigmoid(gate)
    out = _with_earlier(total, row, e, out, here, ADD)
    if FINISH:
        slope = opened * (1.0 + gate * (1.0 - opened))
        tl.store(grad_z + at_grad_z + e, grad_out * out * slope, mask=here)
    else:
        tl.store(total + row + e, out, mask=here)
    return grad_out * gate * opened


@triton.jit(do_not_specialize=["T", "num_utterances", "num_kept"])
def scan_backward(  # noqa: D103, PLR0915  one kernel: what it carries would not fit a helper's arguments
    x,
    dt,
    z,
    A,
    Bmat,
    Cmat,
    D_skip,
    dt_bias,
    lengths,
    grad_y,  # (B, T, E)
    grad_last,  # (B, E, N) or None
    kept,  # from forward
    scratch,  # per program SEGMENT / CHUNK state tiles
    total,  # (B, T, E) contiguous, float32: the sum over directions before the gate
    total_x,  # (B, T, E) contiguous, float32: x's gradient from the earlier direction
    grad_x,  # (B, T, E) contiguous, like grad_dt
    grad_z,  # (B, T, E)
    grad_dt,
    part_B,  # (blocks of channels, B, T, N), like part_C
    part_C,
    part_A,  # (B, E, N)
    part_D,  # (B, E), like part_bias; or None
    part_bias,
    grad_state,  # (B, E, N) or None
    x_b,
    x_t,
    dt_b,
    dt_t,
    z_b,
    z_t,
    B_b,
    B_t,
    C_b,
    C_t,
    gy_b,
    gy_t,
    gz_b,
    gz_t,
    T,
    E,
    num_utterances,
    num_kept,
    N: tl.constexpr,
    STATES: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    ADD: tl.constexpr,
    FINISH: tl.constexpr,
):
    block, b, e, n, tile, in_tile = _block(E, N, STATES, LANES, BLOCK_E)
    rates = tl.load(A + tile, mask=in_tile, other=0.0)
    skip = _per_channel(D_skip, e, E, BLOCK_E)
    bias = _per_channel(dt_bias, e, E, BLOCK_E)
    length = _length(lengths, b, T)
    # the gradient of the state that the frames already walked hand to the one before them
    grad_h = _state(grad_last, b * E * N, tile, in_tile, BLOCK_E, STATES, LANES)
    sum_A = tl.full([BLOCK_E, STATES, LANES], 0.0, tl.float32)
    sum_D = tl.full([BLOCK_E], 0.0, tl.float32)
    sum_bias = tl.full([BLOCK_E], 0.0, tl.float32)
    x += b * x_b
    dt += b * dt_b
    Bmat += b * B_b
    Cmat += b * C_b
    part_row = (block * num_utterances + b) * T
    own = tl.arange(0, BLOCK_E)[:, None, None] * (STATES * LANES) + n[None, :, :]
    slots = scratch + tl.program_id(0).to(tl.int64) * (SEGMENT // CHUNK * BLOCK_E * STATES * LANES)

    num_segments = (length + SEGMENT - 1) // SEGMENT
    for back in range(0, num_segments):
        segment = num_segments - 1 - back
        start = segment * SEGMENT
        num_chunks = (tl.minimum(length - start, SEGMENT) + CHUNK - 1) // CHUNK
        # Forward over the segment once, to have the state before each of its chunks.
        h = tl.load(kept + (b * num_kept + segment) * E * N + tile, mask=in_tile, other=0.0)
        for chunk in range(0, num_chunks):
            tl.store(slots + chunk * (BLOCK_E * STATES * LANES) + own, h)
            for k in tl.static_range(CHUNK):
                i = start + chunk * CHUNK + k
                t, here, x_now, raw, step, b_t = _inputs(
                    x, dt, Bmat, bias, i, length, e, n, E, x_t, dt_t, B_t, N, SOFTPLUS, REVERSE
                )
                h = _decay(step, rates) * h + _outer(step * x_now, b_t)
        tl.debug_barrier()  # the threads that read a slot need not be those that wrote it
        for chunk_back in range(0, num_chunks):
            first = start + (num_chunks - 1 - chunk_back) * CHUNK
            h = tl.load(slots + (num_chunks - 1 - chunk_back) * (BLOCK_E * STATES * LANES) + own)
            # Forward over the chunk; what the way back needs of each step stays in registers.
            decays = ()
            rests = ()
            for k in tl.static_range(CHUNK):
                t, here, x_now, raw, step, b_t = _inputs(
                    x, dt, Bmat, bias, first + k, length, e, n, E, x_t, dt_t, B_t, N, SOFTPLUS, REVERSE
                )
                decays = decays + (_decay(step, rates),)
                rests = rests + (decays[k] * h,)
                h = rests[k] + _outer(step * x_now, b_t)
            for k_back in tl.static_range(CHUNK):
                t, here, x_now, raw, step, b_t = _inputs(
                    x,
                    dt,
                    Bmat,
                    bias,
                    first + (CHUNK - 1 - k_back),
                    length,
                    e,
                    n,
                    E,
                    x_t,
                    dt_t,
                    B_t,
                    N,
                    SOFTPLUS,
                    REVERSE,
                )
                in_row = (n < N) & (first + (CHUNK - 1 - k_back) < length)
                c_t = _load(Cmat, t * C_t, n, in_row)
                row = (b * T + t) * E
                grad_out = _load(grad_y, b * gy_b + t * gy_t, e, here)
                h = rests[CHUNK - 1 - k_back] + _outer(step * x_now, b_t)
                if z is not None:
                    out = _sum_states(h * c_t[None, :, :]) + skip * x_now
                    at_z, at_grad_z = b * z_b + t * z_t, b * gz_b + t * gz_t
                    grad_out = _through_gate(
                        z, grad_z, total, at_z, at_grad_z, row, e, grad_out, out, here, ADD, FINISH
                    )
                grad_h += _outer(grad_out, c_t)
                grad_c = tl.sum(grad_out[:, None, None] * h, axis=0)
                grad_b = tl.sum(grad_h * (step * x_now)[:, None, None], axis=0)
                tl.store(part_C + (part_row + t) * N + n, grad_c, mask=in_row)
                tl.store(part_B + (part_row + t) * N + n, grad_b, mask=in_row)
                grad_input = _sum_states(grad_h * b_t[None, :, :])  # of step * x
                grad_exponent = grad_h * rests[CHUNK - 1 - k_back]  # of step * A
                grad_h *= decays[CHUNK - 1 - k_back]
                sum_A += grad_exponent * step[:, None, None]
                grad_step = grad_input * x_now + _sum_states(grad_exponent * rates)
                if SOFTPLUS:
                    grad_step *= _sigmoid(raw)
                grad_step = tl.where(here, grad_step, 0.0)
                tl.store(grad_dt + row + e, grad_step, mask=here)
                sum_bias += grad_step
                sum_D += grad_out * x_now
                grad_now = _with_earlier(total_x, row, e, grad_input * step + skip * grad_out, here, ADD)
                if FINISH:
                    tl.store(grad_x + row + e, grad_now, mask=here)
                else:
                    tl.store(total_x + row + e, grad_now, mask=here)
        tl.debug_barrier()  # before the next segment's states are written over these
    tl.store(part_A + b * E * N + tile, sum_A, mask=in_tile)
    if part_D is not None:
        tl.store(part_D + b * E + e, sum_D, mask=e < E)
    if part_bias is not None:
        tl.store(part_bias + b * E + e, sum_bias, mask=e < E)
    if grad_state is not None:
        tl.store(grad_state + b * E * N + tile, grad_h, mask=in_tile)
