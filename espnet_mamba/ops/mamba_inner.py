"""Mamba from in_proj's output to out_proj's input as one differentiable step that stores little.

Plain composition keeps the convolution's output, the step sizes and whatever the scan needs. Here the backward pass
makes them again: what stays is the input, the projected ``(dt, B, C)``, and one scan state per 16 frames.

Letters: B utterances, T frames, E channels, N states, R rank of the step sizes, W kernel width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from espnet_mamba.ops import causal_conv1d as conv
from espnet_mamba.ops import selective_scan as scan
from espnet_mamba.ops.causal_conv1d import backends as conv_backends
from espnet_mamba.ops.padding import checked_lengths
from espnet_mamba.ops.selection import requested
from espnet_mamba.ops.selective_scan import backends as scan_backends
from espnet_mamba.ops.selective_scan.protocol import Direction, Kernels, ScanInputs


class Branch(NamedTuple):
    """The weights of one direction of time behind the convolution."""

    x_proj: Tensor  # (R + 2 N, E)
    dt_proj: Tensor  # (E, R)
    dt_bias: Tensor  # (E,)
    A: Tensor  # (E, N), negative
    D_skip: Tensor  # (E,)
    reverse: bool


TENSORS = len(Branch._fields) - 1


def mamba_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    branches: Sequence[Branch],
    *,
    conv_reverse: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Convolve, project, scan in one or two directions and gate (docs/papers.md 2), storing no state per frame.

    Args:
        xz: in_proj's output ``(B, T, 2 E)``: the input and the gate.
        conv_weight: ``(E, W)``.
        conv_bias: ``(E,)``.
        branches: one or two directions that share the convolution's output and the gate.
        conv_reverse: convolve towards the past of a reversed scan, that is over following frames.
        lengths: valid frames ``(B,)``.
        backend: as in ``selective_scan``; one without kernels of its own runs ``mamba_inner_plain``.

    Returns:
        ``(B, T, E)``, 0 in the padding.

    Raises:
        ValueError: as ``selective_scan`` and ``causal_conv1d``.
    """
    lengths = checked_lengths("mamba_inner", lengths, xz)
    backend = requested(backend, scan.BACKENDS, "mamba_inner")
    kernels = _kernels(backend, xz, conv_weight, branches) if xz.numel() else None
    if kernels is None:
        return mamba_inner_plain(
            xz, conv_weight, conv_bias, branches, conv_reverse=conv_reverse, lengths=lengths, backend=backend
        )
    return _run_fused(kernels, conv_reverse, lengths, xz, conv_weight, conv_bias, branches)


def mamba_inner_plain(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    branches: Sequence[Branch],
    *,
    conv_reverse: bool = False,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The same by composition, with autograd's own backward pass: what ``mamba_inner`` is tested against."""
    x, z = xz.chunk(2, dim=-1)
    on_conv = conv_backends.SCAN_NAMES.get(backend, backend)
    u = conv.causal_conv1d(x, conv_weight, conv_bias, lengths=lengths, reverse=conv_reverse, backend=on_conv)
    directions = []
    for branch in branches:
        rank, states = branch.dt_proj.shape[1], branch.A.shape[1]
        dt, Bmat, Cmat = F.linear(u, branch.x_proj).split([rank, states, states], dim=-1)
        dt = F.linear(dt, branch.dt_proj)
        directions.append(Direction(dt, branch.A, Bmat, Cmat, branch.D_skip, branch.dt_bias, None, branch.reverse))
    if len(directions) == 2:
        return scan.selective_scan_bidirectional(u, directions, z, lengths=lengths, backend=backend)
    *tensors, _, reverse = directions[0]
    dt, A, Bmat, Cmat, D_skip, dt_bias = tensors
    return scan.selective_scan(
        u, dt, A, Bmat, Cmat, D_skip, z, dt_bias, lengths=lengths, reverse=reverse, backend=backend
    )


class _Chosen(NamedTuple):
    scan: Kernels
    conv: conv_backends.ConvKernels


@torch.compiler.disable
def _kernels(backend: str, xz: Tensor, conv_weight: Tensor, branches: Sequence[Branch]) -> _Chosen | None:
    """Return the kernels that serve the call, or None if the plain composition must."""
    if backend in ("reference", "torch", "mamba_ssm"):
        return None
    x, z = xz.chunk(2, dim=-1)
    narrow = xz.new_empty(1).expand(*xz.shape[:2], branches[0].A.shape[1])  # stands for B and C
    directions = tuple(Direction(x, b.A, narrow, narrow, b.D_skip, b.dt_bias, None, b.reverse) for b in branches)
    name = scan_backends.choose_backend(backend, ScanInputs(x, z, None, directions, True))
    conv_name = conv_backends.choose_backend(backend, (x, conv_weight, None, None, False, None))
    chosen = scan_backends.kernels_of(name), conv_backends.kernels_of(conv_name)
    return None if None in chosen else _Chosen(*chosen)


@torch.compiler.disable
def _run_fused(
    kernels: _Chosen,
    conv_reverse: bool,
    lengths: Tensor | None,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    branches: Sequence[Branch],
) -> Tensor:
    device = xz.device.type
    # in_proj's output already has autocast's type; the projections inside follow it
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else xz.dtype
    flags = tuple(branch.reverse for branch in branches)
    tensors = [tensor for branch in branches for tensor in branch[:TENSORS]]
    wanted = any(v.requires_grad for v in (xz, conv_weight, conv_bias, *tensors)) and torch.is_grad_enabled()
    options = _Options(kernels, conv_reverse, flags, dtype, wanted)
    return _MambaInner.apply(options, lengths, xz, conv_weight, conv_bias, *tensors)


class _Options(NamedTuple):
    kernels: _Chosen
    conv_reverse: bool
    flags: tuple[bool, ...]
    dtype: torch.dtype  # of the projections
    keep: bool


class _Parts(NamedTuple):
    """What the scan reads."""

    conv: tuple  # the convolution's arguments
    scan: ScanInputs
    joint: list[Tensor]  # per branch (B, T, R + 2 N): dt before its second projection, B, C


def _forward_parts(
    options: _Options,
    lengths: Tensor | None,
    xz: Tensor,
    weights: tuple[Tensor, Tensor],
    branches: list[Branch],
    joint: Sequence[Tensor | None],
) -> _Parts:
    """Compute what stands before the scan; ``joint`` holds x_proj's outputs where they are known already."""
    kernels, dtype = options.kernels, options.dtype
    x, z = xz.to(xz.dtype if xz.dtype in kernels.scan.dtypes else kernels.scan.dtypes[0]).chunk(2, dim=-1)
    arguments = (x, weights[0].to(x.dtype), weights[1].to(x.dtype), lengths, options.conv_reverse, None)
    u = kernels.conv.forward(*arguments)
    directions, projected = [], []
    for branch, known in zip(branches, joint, strict=True):
        rank, states = branch.dt_proj.shape[1], branch.A.shape[1]
        both = F.linear(u.to(dtype), branch.x_proj.to(dtype)) if known is None else known
        dt = F.linear(both[..., :rank], branch.dt_proj.to(dtype)).to(x.dtype)
        Bmat, Cmat = both[..., rank:].to(x.dtype).split(states, dim=-1)
        wide = (branch.A.float(), Bmat, Cmat, branch.D_skip.float(), branch.dt_bias.float(), None, branch.reverse)
        directions.append(Direction(dt, *wide))
        projected.append(both)
    return _Parts(arguments, ScanInputs(u, z, lengths, tuple(directions), True), projected)


def _branches(tensors: Sequence[Tensor], flags: tuple[bool, ...]) -> list[Branch]:
    return [Branch(*tensors[i * TENSORS : (i + 1) * TENSORS], flag) for i, flag in enumerate(flags)]


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        options: _Options,
        lengths: Tensor | None,
        xz: Tensor,
        weight: Tensor,
        bias: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        branches = _branches(tensors, options.flags)
        with torch.autocast(xz.device.type, enabled=False):
            parts = _forward_parts(options, lengths, xz, (weight, bias), branches, [None] * len(branches))
            out = options.kernels.scan.forward(parts.scan, options.keep)
        if options.keep:
            ctx.save_for_backward(lengths, xz, weight, bias, *tensors, *parts.joint, *out.kept)
            ctx.options = options
        return out.y.to(options.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        options, (lengths, xz, weight, bias, *rest) = ctx.options, ctx.saved_tensors
        num_branches, count = len(options.flags), TENSORS * len(options.flags)
        branches, joint = _branches(rest[:count], options.flags), rest[count : count + num_branches]
        with torch.autocast(xz.device.type, enabled=False):
            parts = _forward_parts(options, lengths, xz, (weight, bias), branches, joint)
            grad_xz = torch.empty(xz.shape, dtype=parts.scan.x.dtype, device=xz.device)
            grad_x, grad_z = grad_xz.chunk(2, dim=-1)
            no_states = (None,) * num_branches
            kept = tuple(rest[count + num_branches :])
            grads = options.kernels.scan.backward(parts.scan, kept, grad_y.to(grad_xz.dtype), no_states, grad_z)
            grad_u, grad_branches = grads.x, []
            for branch, direction, both in zip(branches, grads.directions, joint, strict=True):
                grad_u, of_branch = _branch_backward(branch, direction, both, parts.scan.x, grad_u, options.dtype)
                grad_branches += of_branch
            _, grad_weight, grad_bias, _ = options.kernels.conv.backward(*parts.conv, grad_u, grad_x)
        grads_of_conv = grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
        return None, None, grad_xz.to(xz.dtype), *grads_of_conv, *grad_branches


def _branch_backward(
    branch: Branch, grads: Any, joint: Tensor, u: Tensor, grad_u: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Go back through dt_proj and x_proj: u's gradient with this branch's part, and the gradients of its weights."""
    rank = branch.dt_proj.shape[1]
    grad_dt = grads.dt.to(dtype).flatten(0, 1)
    grad_rank = grad_dt @ branch.dt_proj.to(dtype)
    grad_dt_proj = grad_dt.T @ joint[..., :rank].flatten(0, 1)
    grad_states = [grads.Bmat.to(dtype).flatten(0, 1), grads.Cmat.to(dtype).flatten(0, 1)]
    grad_joint = torch.cat([grad_rank, *grad_states], dim=-1)
    grad_x_proj = grad_joint.T @ u.to(dtype).flatten(0, 1)
    through = (grad_joint @ branch.x_proj.to(dtype)).view_as(u)
    weights = (grad_x_proj, grad_dt_proj, grads.dt_bias, grads.A, grads.D_skip)
    return grad_u + through, [g.to(v.dtype) for g, v in zip(weights, branch[:TENSORS], strict=True)]
