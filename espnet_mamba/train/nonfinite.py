"""Steps whose gradient is not finite: skipped, written down with their utterances, the module that began it named."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NONFINITE = "nonfinite_steps.jsonl"


class NonFiniteGuard:
    """Counts skipped steps of one run and stops it after ``limit`` in a row."""

    def __init__(self, model: nn.Module, folder: Path, limit: int, rank: int, distributed: bool) -> None:
        self.model, self.path, self.limit = model, folder / NONFINITE, limit
        self.rank, self.distributed = rank, distributed
        self.in_a_row = 0
        self._buffers: list[Tensor] = []

    def before_step(self) -> None:
        """Remember what a forward pass changes (running statistics): a skipped step must leave no mark on it."""
        self._buffers = [buffer.clone() for buffer in self.model.buffers()]

    def good_step(self) -> None:
        """Count a step that was made."""
        self.in_a_row = 0

    def bad_step(
        self, step: int, utt_ids: list[list[str]], batches: list[dict[str, Tensor]], repeat: Callable[[int], Tensor]
    ) -> None:
        """Write a skipped step down; a collective call, since all processes see the same gradient norm.

        Args:
            step: its number.
            utt_ids: per part of an accumulated step, the utterances.
            batches: per part, the tensors.
            repeat: computes the loss of a part again, with the step's random numbers.

        Raises:
            ValueError: it was the last of ``limit`` in a row.
        """
        self.in_a_row += 1
        where, suspects = self._search(utt_ids, batches, repeat)
        for buffer, before in zip(self.model.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        row = {"step": step, "rank": self.rank, "where": where, "utterances": suspects}
        rows = [row]
        if self.distributed:
            rows = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(rows, row)
        if self.rank == 0:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        found = [row for row in rows if row["where"] != FINITE] or rows
        shown = " ".join(found[0]["utterances"][:8])
        logging.warning(
            f"step {step}: gradient is not finite, update skipped; first in {found[0]['where']}; "
            f"batch: {shown}; all in {self.path}"
        )
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{self.in_a_row} steps in a row had gradients that are not finite, the last at step {step}, first in "
                f"{found[0]['where']}; lower optim_conf.lr or look at the utterances in {self.path}"
            )

    def _search(
        self, utt_ids: list[list[str]], batches: list[dict[str, Tensor]], repeat: Callable[[int], Tensor]
    ) -> tuple[str, list[str]]:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if not _finite(parameter):
                    return f"the parameter {name}, before the step", [utt for ids in utt_ids for utt in ids]
        for part, (ids, batch) in enumerate(zip(utt_ids, batches, strict=True)):
            audio = batch["speech"]
            if not _finite(audio):
                rows = zip(ids, audio, strict=False) if len(audio) == len(ids) else []
                return "the audio itself", [utt for utt, row in rows if not _finite(row)] or list(ids)
            where = first_nonfinite(self.model, lambda part=part: repeat(part))
            if where != FINITE:
                return where, list(ids)
        return FINITE, [utt for ids in utt_ids for utt in ids]


FINITE = "nothing when repeated: on another process, or beyond the range of a sum"


def first_nonfinite(model: nn.Module, compute_loss: Callable[[], Tensor]) -> str:
    """Return the first place, in the order of computation, where ``compute_loss`` or its gradient is not finite.

    Gradients of parameters (``.grad``) are left as they are.
    """
    forward: list[str] = []
    backward: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
            # children end before their parents, so the first name is the innermost
            title = f"{name or 'the model'} ({type(module).__name__})"
            for tensor in _tensors(output):
                if not _finite(tensor):
                    forward.append(f"the output of {title}")
                if tensor.requires_grad:
                    tensor.register_hook(lambda grad: _note(backward, grad, f"the gradient at {title}'s output"))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(watch(name)).remove)
        loss = compute_loss()
        if not forward and _finite(loss):
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for (name, _), gradient in zip(reversed(named), reversed(gradients), strict=True):
                if gradient is not None:
                    _note(backward, gradient, f"the gradient of {name}")
    return (forward or ([] if _finite(loss) else ["the loss"]) or backward or [FINITE])[0]


def _note(notes: list[str], tensor: Tensor, text: str) -> None:
    if not _finite(tensor):
        notes.append(text)


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, however nested."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
