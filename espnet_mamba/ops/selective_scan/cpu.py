"""The selective scan in C (``csrc/selective_scan*.c``), float32: both directions in one call, hand-derived backward.

Letters: B utterances, T frames, E channels, N states.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from espnet_mamba.ops import compiled
from espnet_mamba.ops.selective_scan.protocol import (
    Direction,
    DirectionGrads,
    Kernels,
    ScanGrads,
    ScanInputs,
    ScanOutputs,
)

_FLOAT = {"dtype": torch.float32, "device": "cpu"}  # what the library writes, whatever torch's defaults are


class _Frames(ctypes.Structure):  # these three mirror csrc/scan_tiles.h
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("time", ctypes.c_int64)]


class _Direction(ctypes.Structure):
    _fields_ = [
        *((name, _Frames) for name in ("dt", "B", "C")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "state", "last", "kept")),
        *((name, _Frames) for name in ("grad_dt", "grad_B", "grad_C")),
        *((name, ctypes.c_void_p) for name in ("grad_last", "grad_A", "grad_D", "grad_dt_bias", "grad_state")),
        ("reverse", ctypes.c_int64),
    ]


class _Scan(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "frames", "channels", "states")),
        *((name, ctypes.c_int64) for name in ("directions", "dt_softplus", "threads")),
        ("lengths", ctypes.c_void_p),
        *((name, _Frames) for name in ("x", "z", "y", "grad_y", "grad_x", "grad_z")),
        ("direction", _Direction * 2),
    ]


def make_kernels(variant: str | None = None) -> Kernels:
    """Return the scan's kernels, of one instruction set (a key of ``compiled.VARIANTS``) or of the best one.

    The library is loaded at the first call of a kernel, which raises RuntimeError where there is none; a call raises
    MemoryError where the kernels find no memory to work in.
    """
    return Kernels(functools.partial(_forward, variant), functools.partial(_backward, variant), (torch.float32,))


@functools.cache
def _library(variant: str | None) -> ctypes.CDLL:
    library = compiled.library(variant)
    if library is None:
        raise RuntimeError(f"selective_scan: no compiled kernels ({compiled.unavailable_reason()})")
    for function in (library.scan_forward, library.scan_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Scan)], ctypes.c_int
    library.scan_kept_floats.argtypes, library.scan_kept_floats.restype = [ctypes.c_int64] * 4, ctypes.c_int64
    return library


def _forward(variant: str | None, inputs: ScanInputs, keep: bool) -> ScanOutputs:
    """Scan; see ``Kernels``. Kept per direction: a float32 state for every 16 frames, in the library's layout."""
    library = _library(variant)
    inputs = _readable(inputs)
    y = torch.empty(inputs.x.shape, **_FLOAT)
    shape = (*inputs.x.shape, inputs.directions[0].A.shape[1])
    last = tuple(torch.empty(shape[0], *shape[2:], **_FLOAT) for _ in inputs.directions)
    kept = tuple(torch.empty(library.scan_kept_floats(*shape), **_FLOAT) for _ in inputs.directions) if keep else ()
    scan = _describe(inputs)
    scan.y = _frames(y)
    for i in range(len(last)):
        scan.direction[i].last = last[i].data_ptr()
        scan.direction[i].kept = kept[i].data_ptr() if keep else None
    _call(library.scan_forward, scan)
    return ScanOutputs(y, last, kept)


def _backward(
    variant: str | None,
    inputs: ScanInputs,
    kept: tuple[Tensor, ...],
    grad_y: Tensor,
    grad_last: tuple[Tensor | None, ...],
    grad_z: Tensor | None,
) -> ScanGrads:
    """Return all gradients; see ``Kernels``."""
    inputs = _readable(inputs)
    grad_y = _unit_stride(grad_y.float())
    grad_x = torch.empty(inputs.x.shape, **_FLOAT)
    if inputs.z is None:
        grad_z = None
    elif grad_z is None:
        grad_z = torch.empty(inputs.z.shape, **_FLOAT)
    scan = _describe(inputs)
    scan.grad_y, scan.grad_x, scan.grad_z = _frames(grad_y), _frames(grad_x), _frames(grad_z)
    of_last = [None if grad is None else grad.float().contiguous() for grad in grad_last]
    grads = [_empty_grads(direction) for direction in inputs.directions]
    for way, direction_kept, of_state, grad in zip(scan.direction, kept, of_last, grads, strict=False):
        way.kept, way.grad_last = direction_kept.data_ptr(), _address(of_state)
        way.grad_dt, way.grad_B, way.grad_C = _frames(grad.dt), _frames(grad.Bmat), _frames(grad.Cmat)
        way.grad_A, way.grad_D = _address(grad.A), _address(grad.D_skip)
        way.grad_dt_bias, way.grad_state = _address(grad.dt_bias), _address(grad.state)
    _call(_library(variant).scan_backward, scan)
    return ScanGrads(grad_x, grad_z, tuple(grads))


def _readable(inputs: ScanInputs) -> ScanInputs:
    """Return the inputs as the library reads them: channels next to each other, parameters contiguous."""
    directions = tuple(
        Direction(
            *(_unit_stride(direction.dt), direction.A.contiguous()),
            *(_unit_stride(direction.Bmat), _unit_stride(direction.Cmat)),
            *(None if v is None else v.contiguous() for v in (direction.D_skip, direction.dt_bias, direction.state)),
            direction.reverse,
        )
        for direction in inputs.directions
    )
    z = None if inputs.z is None else _unit_stride(inputs.z)
    lengths = None if inputs.lengths is None else inputs.lengths.contiguous()
    return ScanInputs(_unit_stride(inputs.x), z, lengths, directions, inputs.dt_softplus)


def _describe(inputs: ScanInputs) -> _Scan:
    """Return the library's struct, which points into the tensors of ``inputs``: keep them alive."""
    scan = _Scan(*inputs.x.shape, inputs.directions[0].A.shape[1], len(inputs.directions), inputs.dt_softplus)
    scan.threads = torch.get_num_threads()
    scan.lengths, scan.x, scan.z = _address(inputs.lengths), _frames(inputs.x), _frames(inputs.z)
    for way, direction in zip(scan.direction, inputs.directions, strict=False):
        way.dt, way.B, way.C = _frames(direction.dt), _frames(direction.Bmat), _frames(direction.Cmat)
        way.A, way.D, way.dt_bias = _address(direction.A), _address(direction.D_skip), _address(direction.dt_bias)
        way.state, way.reverse = _address(direction.state), direction.reverse
    return scan


def _empty_grads(direction: Direction) -> DirectionGrads:
    return DirectionGrads(*(None if v is None else torch.empty(v.shape, **_FLOAT) for v in direction[:-1]))


def _unit_stride(frames: Tensor) -> Tensor:
    return frames if frames.stride(-1) == 1 or frames.shape[-1] == 1 else frames.contiguous()


def _frames(tensor: Tensor | None) -> _Frames:
    return _Frames() if tensor is None else _Frames(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(function: ctypes._CFuncPtr, scan: _Scan) -> None:
    if function(ctypes.byref(scan)):
        raise MemoryError("selective_scan: no memory for the kernels' working space")


KERNELS = make_kernels()
