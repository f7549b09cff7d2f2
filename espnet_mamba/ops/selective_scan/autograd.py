"""Makes a backend's forward and backward kernels one differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_mamba.ops.selective_scan.protocol import Direction, Kernels, ScanInputs

TENSORS = len(Direction._fields) - 1  # all but ``reverse``


def scan_with_kernels(kernels: Kernels, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return ``y`` and the last states, differentiable once in every tensor of ``inputs``."""
    tensors = [tensor for direction in inputs.directions for tensor in direction[:TENSORS]]
    flags = tuple(direction.reverse for direction in inputs.directions)
    wanted = any(v is not None and v.requires_grad for v in (inputs.x, inputs.z, *tensors))
    options = (kernels, flags, inputs.dt_softplus, wanted and torch.is_grad_enabled())
    y, *last = _KernelScan.apply(options, inputs.x, inputs.z, inputs.lengths, *tensors)
    return y, tuple(last)


def _gather(x: Tensor, z: Tensor | None, lengths: Tensor | None, tensors: Any, options: tuple) -> ScanInputs:
    """Put the flat list of an ``autograd.Function`` together again."""
    _, flags, dt_softplus, _ = options
    directions = [Direction(*tensors[i * TENSORS : (i + 1) * TENSORS], flag) for i, flag in enumerate(flags)]
    return ScanInputs(x, z, lengths, tuple(directions), dt_softplus)


class _KernelScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, options: tuple, x: Tensor, z: Tensor | None, lengths: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        out = options[0].forward(_gather(x, z, lengths, tensors, options), options[3])
        if options[3]:
            ctx.save_for_backward(x, z, lengths, *tensors, *out.kept)
            ctx.options = options
            ctx.set_materialize_grads(False)
        return out.y, *out.last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, *grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        x, z, lengths, *rest = ctx.saved_tensors
        count = TENSORS * len(ctx.options[1])
        inputs = _gather(x, z, lengths, rest[:count], ctx.options)
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        grads = ctx.options[0].backward(inputs, tuple(rest[count:]), grad_y, grad_last, None)
        return None, grads.x, grads.z, None, *(g for direction in grads.directions for g in direction)
