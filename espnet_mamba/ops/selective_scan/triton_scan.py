"""The selective scan on a GPU: allocates, chooses block shapes and launches the kernels of ``triton_kernels``.

Importing this module raises ImportError where triton is missing. One launch per direction; the second reads the first
one's sums in float32, so that the gate is applied once and half floats are rounded once.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from espnet_mamba.ops.selective_scan import triton_kernels
from espnet_mamba.ops.selective_scan.protocol import (
    Direction,
    DirectionGrads,
    Kernels,
    ScanGrads,
    ScanInputs,
    ScanOutputs,
)

MAX_STATES = 256
MAX_FRAMES = 2**30  # frames are counted in 32 bits; offsets have 64
SEGMENT = 32  # frames between the states that forward keeps: N * 4 / SEGMENT bytes per element of x
CHUNK_FORWARD = 4  # frames unrolled
CHUNK_BACKWARD = 2  # frames unrolled, and whose decays stay in registers; 4 spills
MANY_CHANNELS = 256 * 32  # over all utterances: two programs of 32 channels for each of 128 multiprocessors


class Blocks(NamedTuple):
    """The shape of a program's tile, ``(channels, states, lanes)``, and its warps."""

    channels: int
    states: int
    lanes: int
    warps: int


def blocks(num_utterances: int, num_channels: int, num_states: int) -> Blocks:
    """Choose a tile of which a thread holds 4 states of one channel, or twice 4 with more than 16 states.

    Chosen by compiling for compute capability 9.0 and looking at registers (about 100 forward, 160 backward with 16
    states, 240 with more, next to none spilled), layouts and shuffles. Not measured: no GPU was at hand.
    """
    padded = triton.next_power_of_2(num_states)
    states = 1 if padded <= 16 else 2
    lanes = padded // states
    threads = max(1, lanes // 4)  # that share a channel
    channels = min(32, 256 // threads)
    if num_utterances * num_channels < MANY_CHANNELS:
        channels = min(channels, 16)
    return Blocks(channels, states, lanes, max(1, channels * threads // 32))


def refuses(inputs: ScanInputs) -> str:
    """Say in one line why this call cannot be taken; "" if it can."""
    num_states = inputs.directions[0].A.shape[1]
    if num_states > MAX_STATES:
        return f"triton takes at most {MAX_STATES} states, given {num_states}"
    if inputs.x.shape[1] > MAX_FRAMES:
        return f"triton takes at most {MAX_FRAMES} frames, given {inputs.x.shape[1]}"
    interpreted = not isinstance(triton_kernels.scan_forward, triton.JITFunction)
    if inputs.x.device.type != "cuda" and not interpreted:
        return f"triton needs a CUDA device, given {inputs.x.device}"
    return ""


def forward(inputs: ScanInputs, keep: bool) -> ScanOutputs:
    """Scan; see ``protocol.Kernels``. Keeps one float32 state per direction and ``SEGMENT`` frames."""
    x = _rows(inputs.x)
    num_utterances, num_frames, num_channels = x.shape
    lengths = inputs.lengths
    y = _output(x, lengths)
    num_directions = len(inputs.directions)
    total = x.new_empty(x.shape, dtype=torch.float32) if num_directions > 1 else None
    last, kept = [], []
    for index, given in enumerate(inputs.directions):
        direction = _prepared(given)
        num_states = direction.A.shape[1]
        shape = blocks(num_utterances, num_channels, num_states)
        last.append(_floats(x, num_utterances, num_channels, num_states))
        num_kept = triton.cdiv(num_frames, SEGMENT)
        if keep:
            kept.append(_floats(x, num_utterances, num_kept, num_channels, num_states))
        z = None if inputs.z is None else _rows(inputs.z)
        with _on(x):
            triton_kernels.scan_forward[(num_utterances * triton.cdiv(num_channels, shape.channels),)](
                x=x,
                z=z,
                y=y,
                total=total,
                last=last[-1],
                kept=kept[-1] if keep else None,
                state=direction.state,
                num_kept=num_kept,
                CHUNK=CHUNK_FORWARD,
                **_common(x, z, lengths, direction, shape, index, num_directions, inputs.dt_softplus),
            )
    return ScanOutputs(y, tuple(last), tuple(kept))


def backward(
    inputs: ScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_last: tuple[Tensor | None, ...],
    grad_z: Tensor | None,
) -> ScanGrads:
    """Return the gradients; see ``protocol.Kernels``. The same bits every time."""
    x, grad_y, lengths = _rows(inputs.x), _rows(grad_y), inputs.lengths
    z = None if inputs.z is None else _rows(inputs.z)
    num_directions = len(inputs.directions)
    grad_x = _output(x, lengths)
    if z is None:
        grad_z = None
    elif grad_z is None:
        grad_z = _output(z, lengths)
    elif lengths is not None:
        grad_z.zero_()
    many = num_directions > 1
    total = x.new_empty(x.shape, dtype=torch.float32) if many and z is not None else None
    total_x = x.new_empty(x.shape, dtype=torch.float32) if many else None
    grads = []
    for index, given in enumerate(inputs.directions):
        direction = _prepared(given)
        num_utterances, _, num_channels = x.shape
        num_states = direction.A.shape[1]
        shape = blocks(num_utterances, num_channels, num_states)
        num_blocks = triton.cdiv(num_channels, shape.channels)
        programs = num_utterances * num_blocks
        tile = shape.channels * shape.states * shape.lanes
        parts = _parts(x, lengths, direction, num_blocks)
        strides = {"gy_b": grad_y.stride(0), "gy_t": grad_y.stride(1)}
        strides |= {"gz_b": 0 if z is None else grad_z.stride(0), "gz_t": 0 if z is None else grad_z.stride(1)}
        handed = grad_last[index]
        with _on(x):
            triton_kernels.scan_backward[(programs,)](
                x=x,
                z=z,
                grad_y=grad_y,
                grad_last=None if handed is None else handed.float().contiguous(),
                kept=kept[index],
                scratch=_floats(x, programs * SEGMENT // CHUNK_BACKWARD * tile),
                total=total,
                total_x=total_x,
                grad_x=grad_x,
                grad_z=grad_z,
                num_utterances=num_utterances,
                num_kept=kept[index].shape[1],
                CHUNK=CHUNK_BACKWARD,
                **strides,
                **parts,
                **_common(x, z, lengths, direction, shape, index, num_directions, inputs.dt_softplus),
            )
        grads.append(_summed(given, parts))
    return ScanGrads(grad_x, grad_z, tuple(grads))


KERNELS = Kernels(forward, backward, (torch.float32, torch.bfloat16, torch.float16))


def _common(
    x: Tensor,
    z: Tensor | None,
    lengths: Tensor | None,
    direction: Direction,
    shape: Blocks,
    index: int,
    num_directions: int,
    dt_softplus: bool,
) -> dict[str, object]:
    """The arguments that both kernels take for one direction."""
    strides = {"x_b": x.stride(0), "x_t": x.stride(1)}
    strides |= {"z_b": 0 if z is None else z.stride(0), "z_t": 0 if z is None else z.stride(1)}
    for name, tensor in (("dt", direction.dt), ("B", direction.Bmat), ("C", direction.Cmat)):
        strides |= {f"{name}_b": tensor.stride(0), f"{name}_t": tensor.stride(1)}
    return strides | {
        "dt": direction.dt,
        "A": direction.A,
        "Bmat": direction.Bmat,
        "Cmat": direction.Cmat,
        "D_skip": direction.D_skip,
        "dt_bias": direction.dt_bias,
        "lengths": lengths,
        "T": x.shape[1],
        "E": x.shape[2],
        "N": direction.A.shape[1],
        "STATES": shape.states,
        "LANES": shape.lanes,
        "BLOCK_E": shape.channels,
        "SEGMENT": SEGMENT,
        "SOFTPLUS": dt_softplus,
        "REVERSE": direction.reverse,
        "ADD": index > 0,
        "FINISH": index == num_directions - 1,
        "num_warps": shape.warps,
    }


def _parts(x: Tensor, lengths: Tensor | None, direction: Direction, num_blocks: int) -> dict[str, Tensor | None]:
    """What the backward kernel fills for one direction, before the sums over utterances and blocks of channels."""
    num_utterances, num_frames, num_channels = x.shape
    num_states = direction.A.shape[1]
    per_frame = x.new_empty if lengths is None else x.new_zeros  # the kernel does not write in the padding
    per_state = (num_utterances, num_channels, num_states)
    return {
        "grad_dt": _output(direction.dt, lengths),
        "part_B": per_frame((num_blocks, num_utterances, num_frames, num_states), dtype=torch.float32),
        "part_C": per_frame((num_blocks, num_utterances, num_frames, num_states), dtype=torch.float32),
        "part_A": _floats(x, *per_state),
        "part_D": None if direction.D_skip is None else _floats(x, num_utterances, num_channels),
        "part_bias": None if direction.dt_bias is None else _floats(x, num_utterances, num_channels),
        "grad_state": None if direction.state is None else _floats(x, *per_state),
    }


def _summed(direction: Direction, parts: dict[str, Tensor | None]) -> DirectionGrads:
    part_D, part_bias, grad_state = parts["part_D"], parts["part_bias"], parts["grad_state"]
    return DirectionGrads(
        dt=parts["grad_dt"],
        A=parts["part_A"].sum(0).to(direction.A.dtype),
        Bmat=parts["part_B"].sum(0).to(direction.Bmat.dtype),
        Cmat=parts["part_C"].sum(0).to(direction.Cmat.dtype),
        D_skip=None if part_D is None else part_D.sum(0).to(direction.D_skip.dtype),
        dt_bias=None if part_bias is None else part_bias.sum(0).to(direction.dt_bias.dtype),
        state=None if grad_state is None else grad_state.to(direction.state.dtype),
    )


def _prepared(direction: Direction) -> Direction:
    """Rows read in place where channels (states) are neighbours; the small tensors contiguous float32."""
    small = {name: getattr(direction, name) for name in ("A", "D_skip", "dt_bias", "state")}
    small = {name: None if value is None else value.float().contiguous() for name, value in small.items()}
    rows = {name: _rows(getattr(direction, name)) for name in ("dt", "Bmat", "Cmat")}
    return direction._replace(**small, **rows)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _output(like: Tensor, lengths: Tensor | None) -> Tensor:
    """Contiguous, of the shape and type of ``like``; zeros where the kernels leave the padding untouched."""
    return like.new_empty(like.shape) if lengths is None else like.new_zeros(like.shape)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
