"""The optimizer: which parameters weight decay may shrink, fused updates, and checkpoints of another grouping.

The papers' code decays everything; here nothing whose 0 means something else than "less" (docs/papers.md 9): at A_log 0
every state forgets at one rate, at D 0 the direct path is gone, at a step size's bias 0 a step is 0.69, at a norm's
scale 0 nothing comes through. What is left decays as in fairseq: matrices, convolutions, the classes' embeddings, the
mask embedding.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
FUSED = (torch.optim.Adam, torch.optim.AdamW)
FUSED_DEVICES = ("cpu", "cuda")
NAMES = "names"  # key of a group in a state dict: its parameters' names
OWN = ("weight_decay", "fused", "foreach")  # of a group: this run's say, whatever a checkpoint holds


def build_optimizer(
    model: nn.Module,
    optimizer_class: type[torch.optim.Optimizer],
    options: dict[str, Any],
    exclude: bool = True,
    bias_weight_decay: bool = False,
    normalization_weight_decay: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer with one group of parameters that decay and one of those that do not.

    Updates are fused (one kernel for many parameters) where PyTorch can, unless ``options`` say ``fused`` or
    ``foreach``. A state dict of another grouping is put in order when it is loaded.

    Args:
        model: whose parameters are updated.
        optimizer_class: of PyTorch or alike.
        options: of the class, such as ``lr``.
        exclude: whether anything is kept from decay.
        bias_weight_decay: whether biases decay all the same (ESPnet's ``--exclude_weight_decay_conf``).
        normalization_weight_decay: whether norms do.
    """
    named = dict(model.named_parameters())
    kept = set(undecayed(model, bias_weight_decay, normalization_weight_decay)) if exclude else set()
    kept_in_order = [name for name in named if name in kept]
    names = [[name for name in named if name not in kept]] + ([kept_in_order] if kept_in_order else [])
    groups: list[dict[str, Any]] = [{"params": [named[name] for name in group]} for group in names]
    if kept_in_order:
        groups[1]["weight_decay"] = 0.0
    fused = {} if {"fused", "foreach"} & set(options) else fused_options(model, optimizer_class)
    optimizer = optimizer_class(groups, **(fused | options))
    optimizer.register_state_dict_post_hook(functools.partial(_name, names))
    optimizer.register_load_state_dict_pre_hook(functools.partial(_in_order, names))
    return optimizer


def undecayed(model: nn.Module, biases: bool = False, norms: bool = False) -> Iterator[str]:
    """Yield the names of A_log, D and whatever else its module marks, of biases and norms (unless these decay)."""
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            bias = name.endswith("bias") and not biases
            norm = isinstance(module, NORMS) and not norms
            if bias or norm or getattr(parameter, "_no_weight_decay", False):
                yield f"{path}.{name}" if path else name


def fused_options(model: nn.Module, optimizer_class: type) -> dict[str, bool]:
    """Return ``fused=True`` where the class has it and takes all of the model's parameters, else nothing."""
    able = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in model.parameters())
    return {"fused": True} if able and optimizer_class in FUSED else {}


def _name(names: list[list[str]], _optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    for group, own in zip(state["param_groups"], names, strict=True):
        group[NAMES] = list(own)


def _in_order(names: list[list[str]], optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return ``state`` in the groups of ``optimizer``, by name; older checkpoints have none, but the same groups.

    Raises:
        ValueError: an older one has not; or it holds other parameters.
    """
    saved = state["param_groups"]
    if not all(NAMES in group for group in saved):
        found, wanted = [len(group["params"]) for group in saved], [len(group) for group in names]
        if found != wanted:
            raise ValueError(
                f"its optimizer, of an older version, has groups of {found} parameters, this run's has {wanted}: other "
                "parameters are without weight decay (--exclude_weight_decay)"
            )
        saved = [old | {NAMES: own} for old, own in zip(saved, names, strict=True)]
    home = {name: group for group in saved for name in group[NAMES]}
    old_place = {name: place for group in saved for name, place in zip(group[NAMES], group["params"], strict=True)}
    if set(home) != {name for group in names for name in group}:
        raise ValueError("its optimizer holds parameters of other names")
    if [group[NAMES] for group in saved] != names:
        logging.info("other parameters are without weight decay than when the checkpoint was written")
    ordered: list[dict[str, Any]] = []
    moments: dict[int, Any] = {}
    count = 0
    for group, own in zip(optimizer.param_groups, names, strict=True):
        places = range(count, count := count + len(own))
        old = {key: value for key, value in (home[own[0]] if own else group).items() if key != NAMES}
        ordered.append(old | {key: group[key] for key in OWN if key in group} | {"params": list(places)})
        known = ((place, old_place[name]) for place, name in zip(places, own, strict=True))
        moments |= {place: state["state"][before] for place, before in known if before in state["state"]}
    return state | {"param_groups": ordered, "state": moments}
