"""Mamba-2 as a mixer, computed by Mamba-1's scan: its recurrence is the case in which a head's channels share dt and A.

An extension that no paper here evaluates (one unpublished config has it). Parameters bear mamba-ssm's names.
Letters: B utterances, T frames, D width, E = expand * D, H heads, N states, W kernel width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.mamba import DT_FLOOR, DT_MAX, DT_MIN, MambaState, decay_rates, draw_dt_bias
from espnet_mamba.layers.packing import Lengths, Packing, over_utterances
from espnet_mamba.ops.causal_conv1d import causal_conv1d
from espnet_mamba.ops.selective_scan import selective_scan

A_RANGE = (1.0, 16.0)  # Mamba-2's initial decay rates, uniform


class Mamba2(nn.Module):
    """``[z; x; B; C; dt] = W_in u``, convolution over x, B, C, scan per head, ``W_out RMSNorm(y * SiLU(z))``."""

    def __init__(
        self, embed_dim: int, state_size: int = 64, conv_kernel: int = 4, expand: int = 2, head_dim: int = 64
    ) -> None:
        super().__init__()
        inner = expand * embed_dim
        if head_dim < 1 or inner % head_dim:
            raise ValueError(f"head_dim: {head_dim} does not divide the inner width, {inner}")
        self.head_dim, num_heads = head_dim, inner // head_dim
        self.splits = [inner, inner + 2 * state_size, num_heads]
        self.x_splits = [inner, state_size, state_size]
        self.in_proj = nn.Linear(embed_dim, sum(self.splits), bias=False)
        self.conv1d = nn.Conv1d(self.splits[1], self.splits[1], conv_kernel, groups=self.splits[1])
        self.dt_bias = nn.Parameter(draw_dt_bias(torch.empty(num_heads), DT_MIN, DT_MAX, DT_FLOOR))
        self.A_log = nn.Parameter(torch.empty(num_heads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(num_heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, embed_dim, bias=False)
        for parameter in (self.A_log, self.D, self.dt_bias):
            parameter._no_weight_decay = True

    def forward(
        self, x: Tensor, lengths: Lengths = None, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """Mix ``x (B, T, D)`` over time; arguments and results as ``Mamba.forward``."""
        z, xBC, dt = self.in_proj(x).split(self.splits, dim=-1)
        if isinstance(lengths, Packing):
            mixed = over_utterances(lambda part, own: self._scan(part, own, None)[0], torch.cat([xBC, dt], -1), lengths)
        else:
            mixed, state = self._scan(torch.cat([xBC, dt], -1), lengths, state)
            if lengths is not None:  # a gate in the padding may be NaN
                padding = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
                z = z.masked_fill(padding, 0.0)
        return self.out_proj(self.norm(mixed * F.silu(z))), state

    def _scan(
        self, xBC_dt: Tensor, lengths: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState | None]:
        """Convolve and scan ``(B, T, E + 2 N + H)``; returns y ``(B, T, E)`` and the state if one was given."""
        xBC, dt = xBC_dt.split(self.splits[1:], dim=-1)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        options = {"lengths": lengths, "return_state": True}
        xBC, conv_state = causal_conv1d(xBC, weight, bias, state=state.conv if state else None, **options)
        hidden, Bmat, Cmat = xBC.split(self.x_splits, dim=-1)
        A = self._per_channel(decay_rates(self.A_log))[:, None].expand(-1, self.x_splits[1])
        scan = (hidden, self._per_channel(dt), A, Bmat, Cmat, self._per_channel(self.D), None)
        bias = self._per_channel(self.dt_bias)
        y, scan_state = selective_scan(*scan, bias, state=state.scan if state else None, **options)
        return y, None if state is None else MambaState(conv_state, scan_state)

    def _per_channel(self, heads: Tensor) -> Tensor:
        return heads.repeat_interleave(self.head_dim, dim=-1)

    def start_state(self, num_utterances: int) -> MambaState:
        """Return the state before the first frame: zeros."""
        weight, width = self.in_proj.weight, self.conv1d.weight.shape[2]
        scan = weight.new_zeros(num_utterances, self.x_splits[0], self.x_splits[1], dtype=torch.float32)
        return MambaState(weight.new_zeros(num_utterances, width - 1, self.splits[1]), scan)
