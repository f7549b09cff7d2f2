"""What a run may do to a model's modules without changing its numbers or names: recompute activations, compile parts.

Both replace how a module is called, never the module, so that checkpoints of runs with and without are the same.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from espnet_mamba.layers.attention import SelfAttention


def checkpoint_blocks(model: nn.Module) -> int:
    """Let each block of ``model`` keep its input only, and compute the rest again for the backward pass.

    Gradients, dropout and batch norm's running statistics are those of a run without. Memory falls from all
    activations to one ``(B, T, D)`` per block and those of a single block; the blocks' forward pass is done twice.

    Returns:
        The number of blocks.

    Raises:
        ValueError: the model has none.
    """
    blocks = _blocks(model)
    for block in blocks:
        block.forward = functools.partial(_recomputed, block, block.forward)
    return len(blocks)


def compile_parts(model: nn.Module, **options: Any) -> list[str]:
    """Let ``torch.compile`` fuse the front end and each block, a scan excepted: that has kernels of its own.

    Args:
        model: a pretraining model.
        options: of ``torch.compile``.

    Returns:
        The names of what is compiled, at its first call.

    Raises:
        ValueError: the model has no blocks.
    """
    blocks = _blocks(model)
    for block in blocks:
        mixer = getattr(block, "mixer", None)
        if mixer is not None and not isinstance(mixer, SelfAttention):
            # a compiler cannot see into the scan: the graph would break in the middle of the mixer, several times
            mixer.forward = torch.compiler.disable(mixer.forward)
    parts = [(name, module) for name, module in model.named_modules() if module in set(blocks)]
    parts += [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "front_end"]
    for _, module in parts:
        module.forward = torch.compile(module.forward, **options)
    return [name for name, _ in parts]


def apply_module_options(model: nn.Module, activation_checkpointing: bool, compiled: bool) -> None:
    """Do what ``--compile`` and ``--activation_checkpointing`` ask for, in that order, and say what was done."""
    if compiled:  # first, so that a block computed twice is compiled once
        names = compile_parts(model)
        logging.info(
            f"torch.compile: {len(names)} parts, at their first call: {names[0]} to {names[-1]}; not the scans"
        )
    if activation_checkpointing:
        logging.info(f"activation checkpointing: {checkpoint_blocks(model)} blocks are computed twice")


def _blocks(model: nn.Module) -> list[nn.Module]:
    named = model.named_modules()
    found = [m for name, m in named if name.rpartition(".")[2] == "blocks" and isinstance(m, nn.ModuleList) and len(m)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no blocks to compile or to compute twice")
    return [block for module in found for block in module]


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _StatisticsKept(block)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _StatisticsKept:
    """Keeps batch norms from counting the second pass over the same frames: it goes to copies of their statistics.

    May be entered again, as a second backward pass through the same graph does.
    """

    def __init__(self, block: nn.Module) -> None:
        self.norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.kept: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.kept = [dict(norm._buffers) for norm in self.norms]
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update({name: value.clone() for name, value in buffers.items() if value is not None})

    def __exit__(self, *_exception: Any) -> None:
        for norm, buffers in zip(self.norms, self.kept, strict=True):
            norm._buffers.update(buffers)
