"""FLOP of a forward pass as PyTorch runs it, by part: its own counter, told what it cannot see.

``FlopCounterMode`` counts operators that it knows. A compiled scan is no operator, the plain one is made of products of
chunks that are not the recurrence, and the CPU's fused attention is not in its table. While a count lasts, the scan and
the causal convolution are therefore operators of the library ``espnet_mamba``, whatever backend serves them, and all
three have a formula (``FORMULAS``). On the meta device nothing is computed, so that a model of any size and any length
of audio is counted in a second.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from espnet_mamba.efficiency.macs import FLOP_PER_MAC, SCAN_MACS
from espnet_mamba.ops.causal_conv1d import backends as conv_backends
from espnet_mamba.ops.causal_conv1d import interface as conv_interface
from espnet_mamba.ops.selective_scan import backends as scan_backends
from espnet_mamba.ops.selective_scan import interface as scan_interface
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs, ScanOutputs

TENSORS = len(Direction._fields) - 1  # all but ``reverse``

LIBRARY = torch.library.Library("espnet_mamba", "FRAGMENT")
LIBRARY.define(
    "selective_scan(Tensor x, Tensor? z, Tensor? lengths, Tensor?[] directions, bool[] reverse, bool dt_softplus, "
    "str backend) -> Tensor[]"
)
LIBRARY.define(
    "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? lengths, bool reverse, Tensor? state, str backend) "
    "-> Tensor"
)
SCAN, CONV = torch.ops.espnet_mamba.selective_scan, torch.ops.espnet_mamba.causal_conv1d
# what stands there when no count lasts
_scan_kernels, _run_scan = scan_backends.kernels_of, scan_interface.run_backend
_conv_kernels, _run_conv = conv_backends.kernels_of, conv_interface.run_backend


def scan_flop(
    x: Sequence[int], z: Any, lengths: Any, directions: Sequence[Any], reverse: Sequence[bool], *_: Any, **__: Any
) -> int:
    """Return the FLOP of a scan over shapes: ``SCAN_MACS`` per utterance, frame, channel, state and direction.

    Args:
        x: shape ``(B, T, E)``.
        z, lengths: not read: skip, gate and padding are not part of the count.
        directions: shapes of each ``Direction``'s tensors, one after another.
        reverse: one flag per direction.
    """
    return sum(FLOP_PER_MAC * SCAN_MACS * x[0] * x[1] * x[2] * A[1] for A in directions[1::TENSORS])


def conv_flop(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOP of a causal convolution of ``x (B, T, E)`` with ``weight (E, W)``: W MACs per value."""
    return FLOP_PER_MAC * x[0] * x[1] * weight[0] * weight[1]


def attention_flop(queries: Sequence[int], keys: Sequence[int], values: Sequence[int], *_: Any, **__: Any) -> int:
    """Return the FLOP of attention's two products over all pairs of frames, those that a causal mask hides too."""
    return sdpa_flop_count(queries, keys, values)


ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULAS: dict[Any, Callable[..., int]] = {SCAN: scan_flop, CONV: conv_flop, ATTENTION: attention_flop}


def count_flops(model: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Return part -> FLOP of one forward pass without gradients, by the names of ``macs.count_macs``.

    ``x_proj`` holds ``dt_proj`` too: inside a mixer they cannot be told apart. What belongs to no part stands under
    its module's name.
    """
    return dict(_by_part(_run_counted(lambda: model(*inputs), inputs)))


def total_flops(function: Callable[[], Any], *inputs: Tensor) -> int:
    """Return the FLOP of a call without gradients, whatever is called; ``inputs`` tell its device and type."""
    return _run_counted(function, inputs).get_total_flops()


def _run_counted(function: Callable[[], Any], inputs: Sequence[Tensor]) -> FlopCounterMode:
    for tensor in inputs:  # a backend's comparison with the reference, on first use, must not be counted
        for selector in (scan_backends.SELECTOR, conv_backends.SELECTOR):
            selector.choose("auto", tensor.device, tensor.dtype)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    with torch.no_grad(), operators(), counter:
        function()
    return counter


@contextmanager
def operators() -> Iterator[None]:
    """Make every scan and causal convolution an operator that dispatch modes see; forward only, one thread."""
    scan_backends.kernels_of, scan_interface.run_backend = _visible_scan_kernels, _visible_scan
    conv_backends.kernels_of, conv_interface.run_backend = _visible_conv_kernels, _visible_conv
    try:
        yield
    finally:
        scan_backends.kernels_of, scan_interface.run_backend = _scan_kernels, _run_scan
        conv_backends.kernels_of, conv_interface.run_backend = _conv_kernels, _run_conv


def _visible_scan(backend: str, inputs: ScanInputs) -> tuple[Tensor, tuple[Tensor, ...]]:
    name = scan_backends.choose_backend(backend, inputs)
    if _scan_kernels(name) is not None:  # becomes an operator where its kernels are fetched
        return _run_scan(name, inputs)
    y, *last = _call_scan(name, inputs)
    return y, tuple(last)


def _visible_scan_kernels(name: str) -> Any:
    kernels = _scan_kernels(name)

    def forward(inputs: ScanInputs, keep: bool) -> ScanOutputs:
        y, *last = _call_scan(name, inputs)
        return ScanOutputs(y, tuple(last), ())

    return None if kernels is None else replace(kernels, forward=forward)


def _call_scan(name: str, inputs: ScanInputs) -> list[Tensor]:
    tensors = [tensor for direction in inputs.directions for tensor in direction[:TENSORS]]
    flags = [direction.reverse for direction in inputs.directions]
    return SCAN(inputs.x, inputs.z, inputs.lengths, tensors, flags, inputs.dt_softplus, name)


def _visible_conv(backend: str, arguments: conv_backends.Arguments) -> Tensor:
    name = conv_backends.choose_backend(backend, arguments)
    return _run_conv(name, arguments) if _conv_kernels(name) is not None else CONV(*arguments, name)


def _visible_conv_kernels(name: str) -> Any:
    kernels = _conv_kernels(name)
    return None if kernels is None else kernels._replace(forward=lambda *arguments: CONV(*arguments, name))


@torch.library.impl(LIBRARY, "selective_scan", "CompositeExplicitAutograd")
def _scan(
    x: Tensor, z: Any, lengths: Any, tensors: Sequence[Any], reverse: Sequence[bool], softplus: bool, backend: str
) -> list[Tensor]:
    directions = [Direction(*tensors[i * TENSORS : (i + 1) * TENSORS], flag) for i, flag in enumerate(reverse)]
    inputs = ScanInputs(x, z, lengths, tuple(directions), softplus)
    kernels = _scan_kernels(backend)
    y, last = _run_scan(backend, inputs) if kernels is None else kernels.forward(inputs, False)[:2]
    return [y, *last]


@torch.library.impl(LIBRARY, "selective_scan", "Meta")
def _scan_shapes(x: Tensor, z: Any, lengths: Any, tensors: Sequence[Any], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x), *(A.new_empty(x.shape[0], *A.shape) for A in tensors[1::TENSORS])]


@torch.library.impl(LIBRARY, "causal_conv1d", "CompositeExplicitAutograd")
def _conv(x: Tensor, weight: Tensor, bias: Any, lengths: Any, reverse: bool, state: Any, backend: str) -> Tensor:
    arguments = (x, weight, bias, lengths, reverse, state)
    kernels = _conv_kernels(backend)
    return _run_conv(backend, arguments) if kernels is None else kernels.forward(*arguments)


@torch.library.impl(LIBRARY, "causal_conv1d", "Meta")
def _conv_shapes(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


# Words of a module's path -> part; the last word that is here decides.
_PARTS = (
    {name: name for name in ("front_end", "projection", "position", "head", "in_proj", "out_proj", "join")}
    | {"patch_embedding": "projection", "mixer": "x_proj", "conv": "conv_module"}
    | {name: "feed_forward" for name in ("ffn", "ffn_in", "ffn_out")}
    | {name: "qkv_proj" for name in ("q_proj", "k_proj", "v_proj")}
    | {name: "head" for name in ("classification_head", "reconstruction_head")}
)
_OPERATORS = {SCAN: "scan", CONV: "conv", ATTENTION: "attention"}


def _by_part(counter: FlopCounterMode) -> Counter[str]:
    """Give each module its own operators' FLOP, without those of the modules inside it, and sort them into parts."""
    counts = counter.get_flop_counts()
    everything = counts.pop("Global", {})
    parts: Counter[str] = Counter()
    for name, by_operator in counts.items():
        inner = [other for other in counts if _parent(other, counts) == name]
        for operator, flops in by_operator.items():
            own = flops - sum(counts[other].get(operator, 0) for other in inner)
            if own:
                parts[_part_of(name, operator)] += own
    outside = sum(everything.values()) - sum(parts.values())
    return parts + Counter({"outside": outside})  # an entry of 0 goes away


def _parent(name: str, names: Any) -> str:
    """Return the nearest module around ``name`` that is in ``names``, or an empty string."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in names:
            return name
    return ""


def _part_of(name: str, operator: Any) -> str:
    words = name.split(".")
    known = [word for word in words if word in _PARTS]
    if operator in _OPERATORS:
        return _OPERATORS[operator]
    if not known:
        return name
    inside_mixer = known[-1] == "mixer"
    attention = inside_mixer and operator not in (torch.ops.aten.mm, torch.ops.aten.addmm)
    # a position convolution's own convolution is called conv too
    first = known[0] if known[0] in ("position", "front_end") else known[-1]
    return "attention" if attention else _PARTS[first]
