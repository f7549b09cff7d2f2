"""What each model costs, as rows of a table; and the size at which one model comes nearest another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import nn

from espnet_mamba.efficiency.macs import macs_per_second
from espnet_mamba.layers.block import MIXERS
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.models.sizing import (
    StreamState,
    count_parameters,
    counted_parameters,
    look_ahead,
    receptive_field,
    stream_state,
    width_step,
)
from espnet_mamba.names import nearest

NUM_CLASSES = 504  # what the papers' sizes include: K = 500 clusters and fairseq's 4 special symbols
SECONDS = (5.0, 15.6, 60.0, 320.0)  # 15.6: the papers' longest crop
CROP_SECONDS = 15.6
FFN_MULTIPLE = 8  # a feed-forward part that follows the width is rounded to this
# Millions of parameters that arXiv 2506.12606 and its later version give (docs/papers.md 4), for its own settings only.
REPORTED = {
    "transformer_base": 94.7,
    "causal_transformer_base_paper": 94.7,
    "mamba_base_paper": 78.2,
    "extbimamba_base": 94.3,
    "innbimamba_base": 82.9,
    "innbimamba_mlp_base": 94.7,
    "transformer_small": 23.5,
    "extbimamba_small": 23.2,
}
SIZES = ("params", "macs")
VARIED = {"width": "embed_dim", "depth": "num_layers", "expand": "expand"}  # what may be varied -> its field


@dataclass(frozen=True)
class ModelInfo:
    """A row of the table of models."""

    name: str
    num_parameters: int  # with the head
    macs_per_second: tuple[float, ...]  # one per length, without the head
    look_ahead: str
    state: StreamState | None  # None: the model needs its whole utterance


@dataclass(frozen=True)
class Match:
    """The nearest that a model comes to another's size when one thing is varied."""

    config: HubertConfig  # named after the model that was changed, with _matched
    target: str  # name of the other model
    by: str  # params or macs
    varied: str  # width, depth or expand
    changes: dict[str, int]  # fields of the config and their new values
    size: float  # parameters, or MACs per second
    target_size: float
    seconds: float  # length of the audio, by macs

    @property
    def gap(self) -> float:
        """Relative difference from the target: 0.01 is 1 % larger."""
        return self.size / self.target_size - 1.0


def describe(config: HubertConfig, seconds: Sequence[float] = SECONDS, num_classes: int = NUM_CLASSES) -> ModelInfo:
    """Return a model's row; ValueError for sizes that cannot be, or audio shorter than one frame."""
    return ModelInfo(
        config.name,
        model_size(config, "params", num_classes=num_classes),
        tuple(model_size(config, "macs", length) for length in seconds),
        look_ahead(config)[1],
        stream_state(config),
    )


def model_size(
    config: HubertConfig, by: str, seconds: float = CROP_SECONDS, num_classes: int = NUM_CLASSES
) -> int | float:
    """Return a model's parameters with its head, or its MACs per second of audio at a length, without the head."""
    if by == "params":
        return sum(count_parameters(config, num_classes).values())
    return sum(macs_per_second(config, seconds).values())


def match(
    config: HubertConfig,
    target: HubertConfig,
    by: str = "params",
    vary: str = "width",
    seconds: float = CROP_SECONDS,
    num_classes: int = NUM_CLASSES,
) -> Match:
    """Find the width, depth or expand at which ``config`` comes nearest the size of ``target``.

    A width is a multiple of what heads and groups divide, and the feed-forward part keeps its proportion to it; all
    else stays.

    Args:
        config: the model to change.
        target: the model to match.
        by: params (with the head) or macs (per second of audio, without it).
        vary: width, depth or expand.
        seconds: length of the audio, by macs only.
        num_classes: of both heads, by params only.

    Raises:
        ValueError: no such ``by`` or ``vary``, or a model that has no such thing to vary.
    """
    _check_choice("by", by, SIZES)
    _check_choice("vary", vary, VARIED)
    if vary not in _can_vary(config):
        raise ValueError(f"{config.name}: a model of mixer {config.mixer!r} has no {vary}; vary width or depth")
    target_size = model_size(target, by, seconds, num_classes)
    candidates = _candidates(config, vary)  # ever larger, without end
    best, size = None, 0
    while best is None or size < target_size:
        changes = next(candidates)
        changed = replace(config, name=f"{config.name}_matched", **changes)
        size = model_size(changed, by, seconds, num_classes)
        if best is None or abs(size - target_size) < abs(best.size - target_size):
            best = Match(changed, target.name, by, vary, changes, size, target_size, seconds)
    return best


def match_all(
    configs: Sequence[HubertConfig],
    target: HubertConfig,
    by: str = "params",
    vary: str | None = None,
    seconds: Sequence[float] = (CROP_SECONDS,),
    num_classes: int = NUM_CLASSES,
) -> list[Match]:
    """Match each model: by what ``vary`` names or, without it, by each thing in turn; by macs at each length."""
    lengths = seconds if by == "macs" else seconds[:1]
    return [
        match(config, target, by, varied, length, num_classes)
        for config in configs
        for varied in ([vary] if vary else _can_vary(config))
        for length in lengths
    ]


def _can_vary(config: HubertConfig) -> list[str]:
    own = ("embed_dim", "num_layers", *MIXERS[config.mixer].options)
    return [vary for vary, field in VARIED.items() if field in own]


def _candidates(config: HubertConfig, vary: str) -> Iterator[dict[str, int]]:
    """Yield what to change, for larger and larger models, without end."""
    step = width_step(config) if vary == "width" else 1
    for value in count(step, step):
        changes = {VARIED[vary]: value}
        if vary == "width" and config.ffn_dim:
            share = config.ffn_dim * value / config.embed_dim
            changes["ffn_dim"] = max(1, round(share / FFN_MULTIPLE)) * FFN_MULTIPLE
        if config.embed_dim % width_step(replace(config, **changes)) == 0 or vary == "width":
            yield changes  # left out: an expand whose inner width Mamba-2's heads do not divide


def _check_choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        near = nearest(value, known)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"{name}: {value!r} is not one of: {' '.join(known)}{hint}")


def models_table(models: Sequence[ModelInfo], seconds: Sequence[float] = SECONDS) -> str:
    """Return the Markdown table of some models, the papers' own figures in a column of their own."""
    head = ["model", "parameters (M)", "reported (M)"]
    head += [f"GMAC/s at {length:g} s" for length in seconds] + ["look-ahead", "state of a stream"]
    rows = [
        [f"`{m.name}`", f"{m.num_parameters / 1e6:.2f}", f"{REPORTED[m.name]:.1f}" if m.name in REPORTED else "-"]
        + [_giga(macs) for macs in m.macs_per_second]
        + [m.look_ahead, _state(m.state)]
        for m in models
    ]
    return _markdown(head, rows)


def model_report(config: HubertConfig, seconds: Sequence[float] = SECONDS, num_classes: int = NUM_CLASSES) -> str:
    """Return one model in full, as Markdown: parts by formula and counted, MACs, look-ahead, receptive field, state."""
    model = describe(config, seconds, num_classes)
    formula = count_parameters(config, num_classes)
    counted = counted_parameters(_build(config, num_classes))
    macs = [macs_per_second(config, length) for length in seconds]
    parts = list(dict.fromkeys([*formula, *(part for own in macs for part in own), *counted]))
    rows = [
        [part, f"{formula.get(part, 0):,}", f"{counted.get(part, 0):,}"]
        + [_giga(own[part]) if part in own else "-" for own in macs]
        for part in parts
    ]
    total = ["all", f"{sum(formula.values()):,}", f"{sum(counted.values()):,}"]
    rows.append(total + [_giga(value) for value in model.macs_per_second])
    head = ["part", "parameters", "counted", *(f"GMAC/s at {length:g} s" for length in seconds)]
    lines = [f"# {config.name}", "", _markdown(head, rows), ""]
    lines += [f"look-ahead: {model.look_ahead}", f"receptive field: {receptive_field(config)}"]
    lines += [f"state of a stream: {_state(model.state, in_full=True)}"]
    return "\n".join(lines)


def matches_table(matches: Sequence[Match]) -> str:
    """Return the Markdown table of what was found, one line per match."""
    head = ["model", "varied", "set", "size", "to match", "gap"]
    rows = []
    for found in matches:
        unit, scale = ("M parameters", 1e6) if found.by == "params" else (f"GMAC/s at {found.seconds:g} s", 1e9)
        changes = ", ".join(f"{field}: {value}" for field, value in found.changes.items())
        sizes = [f"{found.size / scale:.2f} {unit}", f"{found.target_size / scale:.2f}, `{found.target}`"]
        rows.append([f"`{found.config.name}`", found.varied, changes, *sizes, f"{100 * found.gap:+.2f} %"])
    return _markdown(head, rows)


def _build(config: HubertConfig, num_classes: int) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return HubertForPretraining(config, num_classes) if num_classes else HubertModel(config)


def _giga(macs: float) -> str:
    return f"{macs / 1e9:.2f}" if macs >= 1e9 else f"{macs / 1e9:.4f}"


def _state(state: StreamState | None, in_full: bool = False) -> str:
    if state is None:
        return "whole utterance"
    parts = [*state.fixed.items(), *((f"{part} per second", size) for part, size in state.growing.items())]
    if in_full:
        return ", ".join(f"{part} {size:,} bytes" for part, size in parts)
    growing = sum(state.growing.values())
    return f"{state.num_bytes() / 1e6:.3f} MB" + (f" + {growing / 1e6:.3f} MB per second" if growing else "")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
