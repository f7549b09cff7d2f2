"""InnBiMamba: two directions of time inside one Mamba, which share in_proj, the gate and out_proj (paper 2).

The class was never released; paper 2 tells what is shared and its 82.9 M parameters fit a shared convolution
(docs/papers.md 3). The second direction's parameters bear Vision Mamba's names (``conv1d_b``, ``A_b_log``, ...), so
that its checkpoints load key by key.
Letters: B utterances, T frames, D width, E = expand * D, N states, R rank of the step sizes, W kernel width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from espnet_mamba.layers.mamba import decay_rates, init_dt, new_A_log, new_D
from espnet_mamba.layers.packing import Lengths, over_utterances
from espnet_mamba.ops.mamba_inner import Branch, mamba_inner


class InnBiMamba(nn.Module):
    """``[x; z] = W_in u``, ``y = W_out((S_f(x) + R S_b(R x)) * SiLU(z))``; R reverses each utterance over its length.

    S is convolution, projections and scan with weights of a direction's own. With ``share_conv`` the two scans read the
    output of one causal convolution, so that both run in one pass over the same input. ``join="mean"`` halves the sum,
    as SSAMBA does.
    """

    def __init__(
        self,
        embed_dim: int,
        state_size: int = 16,
        conv_kernel: int = 4,
        expand: int = 2,
        share_conv: bool = True,
        join: str = "sum",
        dt_init: str = "mamba",
    ) -> None:
        super().__init__()
        if join not in ("sum", "mean"):
            raise ValueError(f"join: {join!r} is not one of: sum mean")
        inner, rank = expand * embed_dim, math.ceil(embed_dim / 16)
        self.scale = 0.5 if join == "mean" else 1.0
        self.in_proj = nn.Linear(embed_dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log, self.D = new_A_log(inner, state_size), new_D(inner)
        self.conv1d_b = None if share_conv else nn.Conv1d(inner, inner, conv_kernel, groups=inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj_b = nn.Linear(rank, inner)
        self.A_b_log, self.D_b = new_A_log(inner, state_size), new_D(inner)
        self.out_proj = nn.Linear(inner, embed_dim, bias=False)
        init_dt(self.dt_proj, dt_init)
        init_dt(self.dt_proj_b, dt_init)

    def forward(self, x: Tensor, lengths: Lengths = None, state: None = None) -> tuple[Tensor, None]:
        """Mix ``x (B, T, D)`` over both directions; ``lengths`` as in ``Mamba``. No state: it needs the future.

        Raises:
            ValueError: a state is given.
        """
        if state is not None:
            raise ValueError("InnBiMamba reads the whole utterance and cannot run in chunks; use a causal model")
        y = over_utterances(self._mix, self.in_proj(x), lengths)
        return self.out_proj(y * self.scale if self.scale != 1.0 else y), None

    def _mix(self, xz: Tensor, lengths: Tensor | None) -> Tensor:
        ahead = self._branch(self.x_proj, self.dt_proj, self.A_log, self.D, reverse=False)
        back = self._branch(self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b, reverse=True)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        if self.conv1d_b is None:
            return mamba_inner(xz, weight, bias, [ahead, back], lengths=lengths)
        # each direction gates its own part: (a + b) * g = a * g + b * g
        weight_b, bias_b = self.conv1d_b.weight.squeeze(1), self.conv1d_b.bias
        y = mamba_inner(xz, weight, bias, [ahead], lengths=lengths)
        return y + mamba_inner(xz, weight_b, bias_b, [back], conv_reverse=True, lengths=lengths)

    @staticmethod
    def _branch(x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor, reverse: bool) -> Branch:
        return Branch(x_proj.weight, dt_proj.weight, dt_proj.bias, decay_rates(A_log), D, reverse)
