"""Where the time of a Mamba block goes, and a whole Mamba layer beside a Transformer layer on long audio.

For example: python benchmarks/bench_block.py --threads 2 --rounds 20 --output block.md
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from goals import kernel_of
from peers import Case, TransformerLayer, build_job, module_job, projections
from timing import PASSES, Job, Times, machine, number, peak_memory, table, time_interleaved
from torch import Tensor, nn

from espnet_mamba.layers.block import MIXERS, EncoderBlock
from espnet_mamba.layers.mamba import Mamba
from espnet_mamba.ops.causal_conv1d import causal_conv1d

MODELS = Path(__file__).resolve().parents[1] / "conf" / "models"
FRAMES_PER_SECOND = 50
MAMBAS = ("mamba", "extbimamba", "innbimamba")  # mixers of Mamba-1
KERNEL = 4  # taps of the convolution
LARGEST_SHARE = 1.20  # of its matmuls, for the whole block in both directions


class Block(NamedTuple):
    """One Mamba block: B utterances, T frames, width D, E = expand * D channels, N states."""

    batch: int
    frames: int
    width: int
    expand: int
    states: int
    device: str
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """E."""
        return self.expand * self.width


class _Copy(torch.autograd.Function):
    """One memory pass each way: the least that anything over (B, T, E) can cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device).copy_(grad)


class Fused(nn.Module):
    """in_proj, ``mamba_inner``, out_proj and nothing else."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, D)`` to ``(B, T, D)``."""
        from espnet_mamba.ops.mamba_inner import Branch, mamba_inner

        m = self.mixer
        rates = -torch.exp(m.A_log.float())
        branch = Branch(m.x_proj.weight, m.dt_proj.weight, m.dt_proj.bias, rates, m.D, False)
        y = mamba_inner(m.in_proj(x), m.conv1d.weight.squeeze(1), m.conv1d.bias, [branch])
        return m.out_proj(y)


def _half(block: Block) -> tuple[Tensor, Tensor]:
    """Return x as it stands in in_proj's output, every second half of a frame, and a gradient."""
    B, T, E = block.batch, block.frames, block.channels
    joint = torch.randn(B, T, 2 * E, device=block.device, dtype=block.dtype)
    return joint[..., :E].detach().requires_grad_(), torch.randn(B, T, E, device=block.device, dtype=block.dtype)


def _conv(backend: str, block: Block) -> Job:
    x, grad = _half(block)
    weight = (torch.randn(block.channels, KERNEL) / 2).to(block.device, block.dtype).requires_grad_()
    bias = torch.randn(block.channels).to(block.device, block.dtype).requires_grad_()
    return Job(lambda: causal_conv1d(x, weight, bias, backend=backend), [x, weight, bias], grad)


def _conv1d_silu(block: Block) -> Job:
    """What mamba-ssm's and transformers' plain paths do, in their layout (B, E, T)."""
    B, T, E = block.batch, block.frames, block.channels
    conv = nn.Conv1d(E, E, KERNEL, groups=E, padding=KERNEL - 1).to(block.device, block.dtype)
    x = torch.randn(B, E, T, device=block.device, dtype=block.dtype, requires_grad=True)
    grad = torch.randn(B, E, T, device=block.device, dtype=block.dtype)
    return Job(lambda: F.silu(conv(x)[..., :T]), [x, *conv.parameters()], grad)


def _memcpy(block: Block) -> Job:
    x, grad = _half(block)
    return Job(lambda: _Copy.apply(x), [x], grad)


def _scan(block: Block) -> Job:
    case = Case(block.batch, block.channels, block.frames, block.states, block.device, block.dtype)
    return build_job(kernel_of(block.device), case)


def _matmuls(block: Block) -> Job:
    B, T, D, _, N, device, dtype = block
    return projections(B, T, D, block.channels, N, device, dtype)


def _mixer(name: str, block: Block) -> Job:
    options = {"state_size": block.states, "conv_kernel": KERNEL, "expand": block.expand}
    mixer = MIXERS[name][0](block.width, **options)
    return module_job(mixer, (block.batch, block.frames, block.width), block.device, block.dtype)


def _fused(block: Block) -> Job:
    mixer = Mamba(block.width, state_size=block.states, conv_kernel=KERNEL, expand=block.expand)
    return module_job(Fused(mixer), (block.batch, block.frames, block.width), block.device, block.dtype)


PARTS: dict[str, Callable[[Block], Job]] = {
    "four matmuls": _matmuls,
    "convolution + SiLU": functools.partial(_conv, "auto"),
    "scan": _scan,
    "in_proj, mamba_inner, out_proj": _fused,
    **{f"layer {name}": functools.partial(_mixer, name) for name in MIXERS if name in MAMBAS},
    "convolution + SiLU, torch backend": functools.partial(_conv, "torch"),
    "torch's Conv1d + SiLU (B, E, T)": _conv1d_silu,
    "memcpy of the convolution's bytes": _memcpy,
}
SUMMED = ("four matmuls", "convolution + SiLU", "scan")


def build_part(name: str, block: Block) -> Job:
    """Return one candidate; a function of its own so that another process can call it."""
    return PARTS[name](block)


def breakdown(block: Block, args: argparse.Namespace) -> str:
    """Time a block's parts and wholes, and return a table and the goal's line."""
    times, failed = _time({name: functools.partial(build_part, name, block) for name in PARTS}, args)
    wholes = [name for name in ("layer mamba",) if name in times[1]]
    rows = []
    for name in PARTS:
        if name not in times[1]:
            continue
        peaks = {}
        if not args.no_memory:
            peaks = peak_memory(build_part, (name, block), PASSES, args.threads, block.device)
        memory = " / ".join(number(peaks.get(label, float("nan"))) for label in PASSES)
        share = times[1][name].median / times[1][wholes[0]].median if wholes else float("nan")
        rows.append([name, times[0][name].cell(), times[1][name].cell(), f"{100 * share:.1f} %", memory])
    if wholes and all(name in times[1] for name in SUMMED):
        rows.append(_rest(times, wholes[0]))
    head = ["part", "forward ms", "f+b ms", "of layer mamba", "memory f / f+b MiB"]
    title = f"\n## A block of (B, T, D) = {tuple(block[:3])}, E = {block.channels}, N = {block.states}\n"
    return "\n".join([title, table(head, rows), "", *failed, *_goal(times[1])])


def _rest(times: list[dict[str, Times]], whole: str) -> list[str]:
    rest = [at[whole].median - sum(at[name].median for name in SUMMED) for at in times]
    share = 100 * rest[1] / times[1][whole].median
    return ["rest of layer mamba", *(number(1e3 * value) for value in rest), f"{share:.1f} %", "-"]


def _goal(times: dict[str, Times]) -> list[str]:
    """The matmuls of two directions are those of one, twice: ExtBiMamba shares no projection."""
    if "layer extbimamba" not in times or "four matmuls" not in times:
        return []
    ratio = times["layer extbimamba"].median / (2 * times["four matmuls"].median)
    word = "met" if ratio <= LARGEST_SHARE else "MISSED"
    return [f"- goal whole block in both directions / its matmuls <= {LARGEST_SHARE}: measured {ratio:.2f}, {word}"]


def _time(builders: dict[str, Callable[[], Job]], args: argparse.Namespace) -> tuple[list[dict[str, Times]], list[str]]:
    """Return the times of both passes, and a line for every candidate that failed, which is left out."""
    jobs, failed = {}, []
    for name, build in builders.items():
        try:
            jobs[name] = build()
        except Exception as error:  # something that this tree or machine lacks
            failed.append(f"- {name}: failed: {type(error).__name__}: {error}")
    times = [time_interleaved(jobs, label, args.rounds, args.device) for label in PASSES]
    bad = {name: at[name].note for at in times for name in at if not at[name].seconds}
    failed += [f"- {name}: {note}" for name, note in bad.items()]
    return [{name: at[name] for name in at if name not in bad} for at in times], failed


def layers(seconds: float, args: argparse.Namespace, dtype: torch.dtype) -> str:
    """Time whole layers at one length of audio: the models of ``conf/models`` and a Transformer of the same width."""
    frames = round(FRAMES_PER_SECOND * seconds)
    builders, width = {}, args.layer_width
    for name in ("mamba_base", "extbimamba_base"):
        model = yaml.safe_load((MODELS / f"{name}.yaml").read_text(encoding="utf-8"))
        width = args.layer_width or model["embed_dim"]
        options = {key: model[key] for key in ("state_size", "conv_kernel", "expand")}
        layer = EncoderBlock(width, model["mixer"], options, dropout=0.0)
        builders[f"{name} layer"] = functools.partial(
            module_job, layer, (args.batch, frames, width), args.device, dtype
        )
    shape = (args.batch, frames, width)
    builders["transformer_base layer"] = functools.partial(
        module_job, TransformerLayer(width), shape, args.device, dtype
    )
    times, failed = _time(builders, args)
    other = [at["transformer_base layer"].median for at in times]
    rows = []
    for name in times[1]:
        cells = [at[name].cell() for at in times]
        ratios = [f"{mine[name].median / theirs:.2f}" for mine, theirs in zip(times, other, strict=True)]
        rows.append([name, cells[0], ratios[0], cells[1], ratios[1]])
    head = ["layer", "forward ms", "of Transformer's", "f+b ms", "of Transformer's"]
    title = f"\n## Layers at {seconds:g} s: (B, T, D) = {shape}\n"
    return "\n".join([title, table(head, rows), "", *failed])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parse(arguments)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "bfloat16"))
    parts = ["# Mamba block\n", machine(args.device), f"- type: {str(dtype).removeprefix('torch.')}"]
    print("\n".join(parts), flush=True)
    for batch, frames, width in args.shapes:
        block = Block(batch, frames, width, args.expand, args.states, args.device, dtype)
        parts.append(breakdown(block, args))
        print(parts[-1], flush=True)
    for seconds in args.seconds:
        parts.append(layers(seconds, args, dtype))
        print(parts[-1], flush=True)
    if args.output:
        args.output.write_text("\n".join(parts) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", type=_shape, default=[(4, 500, 768), (1, 3000, 768)], metavar="B,T,D")
    parser.add_argument("--expand", type=int, default=2, help="E / D")
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--seconds", nargs="*", type=float, default=[15.6, 60.0], help="of audio, for whole layers")
    parser.add_argument("--batch", type=int, default=1, help="for whole layers")
    parser.add_argument("--layer_width", type=int, help="of whole layers instead of the models' own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, bfloat16 on cuda"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory: a process per candidate")
    parser.add_argument("--output", type=Path, help="also write the report there")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form B,T,D") from error
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form B,T,D with positive numbers")
    return shape


if __name__ == "__main__":
    sys.exit(main())
