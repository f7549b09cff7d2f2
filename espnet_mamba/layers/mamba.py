"""Mamba-1 as a mixer, in one direction of time.

Parameters bear mamba-ssm's names, so that its checkpoints load key by key.
Letters: B utterances, T frames, D width, E = expand * D, N states, R rank of the step sizes, W kernel width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.packing import Lengths, over_utterances
from espnet_mamba.ops.causal_conv1d import causal_conv1d
from espnet_mamba.ops.mamba_inner import Branch, mamba_inner
from espnet_mamba.ops.selective_scan import selective_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4  # seconds-free step sizes of Mamba's initialisation (docs/papers.md 2)


def new_A_log(inner: int, state_size: int) -> nn.Parameter:
    """Return ``log(1..N)`` for every channel ``(E, N)``, marked to stay without weight decay."""
    A_log = nn.Parameter(torch.log(torch.arange(1, state_size + 1, dtype=torch.float32).repeat(inner, 1)))
    A_log._no_weight_decay = True
    return A_log


def decay_rates(A_log: Tensor) -> Tensor:
    """Return ``A = -exp(A_log)``, in float32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def new_D(inner: int) -> nn.Parameter:
    """Return the weights of the direct path, ones ``(E,)``, marked to stay without weight decay."""
    D = nn.Parameter(torch.ones(inner))
    D._no_weight_decay = True
    return D


def draw_dt_bias(like: Tensor, low: float, high: float, floor: float) -> Tensor:
    """Return biases whose softplus is log-uniform in ``[low, high]``, at least ``floor``."""
    start, stop = math.log(low), math.log(high)
    steps = torch.exp(torch.rand_like(like) * (stop - start) + start).clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))  # inverse of softplus


@torch.no_grad()
def init_dt(dt_proj: nn.Linear, dt_init: str) -> None:
    """Initialise the step sizes: ``mamba`` draws softplus(bias) log-uniformly from [1e-3, 0.1]; ``bert_reset``
    repeats the papers' mistake, weights N(0, 0.02) and bias 0, so steps of 0.693 (docs/papers.md 9).

    Raises:
        ValueError: unknown ``dt_init``.
    """
    weight, bias = dt_proj.weight, dt_proj.bias
    if dt_init == "mamba":
        nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        bias.copy_(draw_dt_bias(bias, DT_MIN, DT_MAX, DT_FLOOR))
    elif dt_init == "bert_reset":
        nn.init.normal_(weight, 0.0, 0.02)
        nn.init.zeros_(bias)
    else:
        raise ValueError(f"dt_init: {dt_init!r} is not one of: mamba bert_reset")


class MambaState(NamedTuple):
    """What one direction carries from a chunk to the next."""

    conv: Tensor  # (B, W - 1, E)
    scan: Tensor  # (B, E, N), float32


class Mamba(nn.Module):
    """The Mamba block of docs/papers.md 2: in_proj, causal convolution, selective scan, gate, out_proj."""

    def __init__(
        self,
        embed_dim: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        reverse: bool = False,
        dt_init: str = "mamba",
    ) -> None:
        super().__init__()
        inner, rank = expand * embed_dim, math.ceil(embed_dim / 16)
        self.splits = [rank, state_size, state_size]
        self.reverse = reverse
        self.in_proj = nn.Linear(embed_dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = new_A_log(inner, state_size)
        self.D = new_D(inner)
        self.out_proj = nn.Linear(inner, embed_dim, bias=False)
        init_dt(self.dt_proj, dt_init)

    def forward(
        self, x: Tensor, lengths: Lengths = None, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """Mix frames over time.

        Args:
            x: ``(B, T, D)``.
            lengths: valid frames ``(B,)``, or the utterances of a packed row; None when nothing is padded.
            state: what the last chunk returned, for a causal pass in chunks (``start_state`` for the first one).

        Returns:
            ``(B, T, D)``, zero in the padding, and the state after the last valid frame if a state was given.
        """
        xz = self.in_proj(x)
        if state is not None:
            return self._continue(xz, lengths, state)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias

        def mix(xz: Tensor, lengths: Tensor | None) -> Tensor:
            return mamba_inner(xz, weight, bias, [self._branch()], conv_reverse=self.reverse, lengths=lengths)

        return self.out_proj(over_utterances(mix, xz, lengths)), None

    def _branch(self) -> Branch:
        A = decay_rates(self.A_log)
        return Branch(self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, A, self.D, self.reverse)

    def _continue(self, xz: Tensor, lengths: Tensor | None, state: MambaState) -> tuple[Tensor, MambaState]:
        """Mix one chunk, step by step instead of fused: from the state before it to the state after it."""
        hidden, gate = xz.chunk(2, dim=-1)
        options = {"lengths": lengths, "reverse": self.reverse, "return_state": True}
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        hidden, conv_state = causal_conv1d(hidden, weight, bias, state=state.conv, **options)
        dt, Bmat, Cmat = self.x_proj(hidden).split(self.splits, dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = decay_rates(self.A_log)
        y, scan_state = selective_scan(
            hidden, dt, A, Bmat, Cmat, self.D, gate, self.dt_proj.bias, state=state.scan, **options
        )
        return self.out_proj(y), MambaState(conv_state, scan_state)

    def start_state(self, num_utterances: int) -> MambaState:
        """Return the state before the first frame: zeros."""
        inner, width = self.conv1d.weight.shape[0], self.conv1d.weight.shape[2]
        weight = self.in_proj.weight
        scan = weight.new_zeros(num_utterances, inner, self.A_log.shape[1], dtype=torch.float32)
        return MambaState(weight.new_zeros(num_utterances, width - 1, inner), scan)
