"""What counters of other people read for our models, and which parts they read as 0.

Each runs the model as it runs by default, with compiled kernels and fused attention: a counter knows operators, and
these are none that it knows. None raises; what is not known is not there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from espnet_mamba.efficiency.flop_counting import count_flops
from espnet_mamba.efficiency.macs import FLOP_PER_MAC, SAMPLE_RATE, SCAN_MACS, count_macs_of, shortest_samples
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.model import SsambaModel

PARALLEL_SCAN_FLOP = (
    9  # per frame, channel and state: Mamba's authors, for an associative scan (state-spaces/mamba#110)
)


@dataclass(frozen=True)
class Reading:
    """What one counter reads for one forward pass."""

    counter: str
    macs: int | None  # by the counter's own rules; None: not installed
    products: int | None  # of these, convolutions and products of matrices: what our parts count
    zero: tuple[str, ...]  # our parts that it reads as 0

    def unexplained(self, parts: dict[str, int]) -> int:
        """Return what ``products`` is off from ``parts`` (``count_macs_of``) without those read as 0."""
        return (self.products or 0) - sum(macs for part, macs in parts.items() if part not in self.zero)


class _LastState(nn.Module):
    """Returns one tensor, for counters that trace."""

    def __init__(self, config: HubertConfig | SsambaConfig) -> None:
        super().__init__()
        self.model = SsambaModel(config) if isinstance(config, SsambaConfig) else HubertModel(config)

    def forward(self, wavs: Tensor) -> Tensor:
        return self.model(wavs).hidden_states[-1]


def read_counters(config: HubertConfig | SsambaConfig, num_samples: int) -> list[Reading]:
    """Run a model with random weights under each counter, on the CPU.

    Args:
        config: the model.
        num_samples: of one utterance.

    Returns:
        PyTorch's counter, PyTorch's with our operators registered, calflops, fvcore.
    """
    model = _LastState(config).eval()
    with torch.no_grad():  # kernels are compared with the reference at their first call, which is not to be counted
        model(torch.zeros(1, shortest_samples(config)))
    wavs = torch.zeros(1, num_samples)
    return [_read(name, read, model, wavs) for name, read in _COUNTERS.items()]


def counters_table(configs: Sequence[HubertConfig | SsambaConfig], seconds: float) -> str:
    """Return the Markdown table of what each counter reads, in GMAC per second of audio, and what it misses."""
    lines = ["| model | counter | GMAC/s | of ours | read as 0 |", "| --- | --- | --- | --- | --- |"]
    for config in configs:
        num_samples = round(seconds * SAMPLE_RATE)
        parts = count_macs_of(config, num_samples)
        total = sum(parts.values())
        lines.append(_line(config.name, "by formula", total, total, seconds, "-"))
        if "scan" in parts:
            more = parts["scan"] * (PARALLEL_SCAN_FLOP - FLOP_PER_MAC * SCAN_MACS) // (FLOP_PER_MAC * SCAN_MACS)
            name = f"by formula, scan of {PARALLEL_SCAN_FLOP} FLOP"
            lines.append(_line(config.name, name, total + more, total, seconds, "-"))
        for reading in read_counters(config, num_samples):
            zero = ", ".join(part for part in reading.zero if part in parts) or "-"
            zero += f"; {reading.unexplained(parts):+,} unexplained" if reading.unexplained(parts) else ""
            lines.append(_line(config.name, reading.counter, reading.macs, total, seconds, zero))
    return "\n".join(lines)


def _line(model: str, counter: str, macs: int | None, ours: int, seconds: float, zero: str) -> str:
    if macs is None:
        return f"| `{model}` | {counter} | not installed | - | - |"
    return f"| `{model}` | {counter} | {macs / seconds / 1e9:.3f} | {100 * macs / ours:.1f} % | {zero} |"


def _read(name: str, read: Callable[[nn.Module, Tensor], tuple[int, int]], model: _LastState, wavs: Tensor) -> Reading:
    if name in ("calflops", "fvcore") and importlib.util.find_spec(name) is None:
        return Reading(name, None, None, ())
    macs, products = read(model, wavs)
    # the product with SSAMBA's mel filters is torch.mm, which calflops does not know
    more = ("front_end",) if name == "calflops" and isinstance(model.model, SsambaModel) else ()
    return Reading(name, macs, products, READ_AS_ZERO[name] + more)


def _read_torch(model: nn.Module, wavs: Tensor) -> tuple[int, int]:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(wavs)
    macs = counter.get_total_flops() // FLOP_PER_MAC
    return macs, macs


def _read_registered(model: nn.Module, wavs: Tensor) -> tuple[int, int]:
    macs = sum(count_flops(model, wavs).values()) // FLOP_PER_MAC
    return macs, macs


def _read_calflops(model: nn.Module, wavs: Tensor) -> tuple[int, int]:
    from calflops import calculate_flops

    options = {"print_results": False, "print_detailed": False, "output_as_string": False}
    with torch.no_grad():
        _, macs, _ = calculate_flops(model, args=[wavs], **options)
    return int(macs), int(macs)


def _read_fvcore(model: nn.Module, wavs: Tensor) -> tuple[int, int]:
    from fvcore.nn import FlopCountAnalysis

    with torch.no_grad():
        analysis = FlopCountAnalysis(model, wavs).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        by_operator = analysis.by_operator()
    norms = sum(count for name, count in by_operator.items() if "norm" in name)  # which our parts leave out
    return int(sum(by_operator.values())), int(sum(by_operator.values()) - norms)


_COUNTERS: dict[str, Callable[[nn.Module, Tensor], tuple[int, int]]] = {
    "torch.utils.flop_counter": _read_torch,
    "the same, our operators registered": _read_registered,
    "calflops": _read_calflops,
    "fvcore": _read_fvcore,
}
_FUSED = ("conv", "scan", "attention")  # no operator, or one that is in no table
# fvcore traces a graph, in which the whole inside of a Mamba is one node
READ_AS_ZERO: dict[str, tuple[str, ...]] = {
    "torch.utils.flop_counter": _FUSED,
    "the same, our operators registered": (),
    "calflops": _FUSED,
    "fvcore": ("x_proj", "dt_proj", *_FUSED),
}
