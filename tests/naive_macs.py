"""Models run in plain Python, one multiplication at a time and each one counted: what the formulas are held against.

``NaiveRun`` walks a ``HubertModel`` or an ``SsambaModel`` with its own weights. ``dot`` and ``scan`` count products;
nothing else is counted: norms and activations are PyTorch's. Taps that meet the zeros around a sequence are multiplied
and counted, as a framework does it. ``excluded`` holds what the formulas leave out of the scan.
"""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.layers.attention import SelfAttention
from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.block import MacaronBlock
from espnet_mamba.layers.innbimamba import InnBiMamba
from espnet_mamba.layers.mamba import Mamba, decay_rates
from espnet_mamba.layers.mamba2 import Mamba2
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.model import SsambaModel


class NaiveRun:
    """One forward pass of one utterance: ``macs`` holds part -> MACs, ``excluded`` what else the scan does."""

    def __init__(self) -> None:
        self.macs: Counter[str] = Counter()
        self.excluded: Counter[str] = Counter()

    def dot(self, part: str, xs: list[float], ws: list[float]) -> float:
        """Return the sum of products, one MAC each."""
        total = 0.0
        for x, w in zip(xs, ws, strict=True):
            total += x * w
            self.macs[part] += 1
        return total

    def linear(self, part: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map ``x (T, I)`` by ``weight (O, I)``."""
        columns = weight.tolist()
        y = torch.tensor([[self.dot(part, row, column) for column in columns] for row in x.tolist()])
        return y if bias is None else y + bias

    def conv(self, part: str, x: Tensor, conv_weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
        """Convolve ``x (C, T)`` with ``(O, C / groups, W)``; returns ``(O, T')``."""
        outputs, inner, width = conv_weight.shape
        groups = len(x) // inner
        rows = []
        for channel, taps in enumerate(conv_weight.flatten(1).tolist()):
            first = channel * groups // outputs * inner
            windows = (x[first : first + inner, t : t + width] for t in range(0, x.shape[1] - width + 1, stride))
            rows.append([self.dot(part, window.flatten().tolist(), taps) for window in windows])
        y = torch.tensor(rows)
        return y if bias is None else y + bias[:, None]

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, Bmat: Tensor, Cmat: Tensor, D: Tensor, reverse: bool) -> Tensor:
        """Scan ``x (T, E)``, ``dt (T, E)`` after softplus, ``A (E, N)``, ``Bmat, Cmat (T, N)``; without the gate."""
        y = torch.zeros_like(x)
        state = torch.zeros_like(A)
        times = range(len(x))
        for t in reversed(times) if reverse else times:
            for e in range(x.shape[1]):
                drive = dt[t, e] * x[t, e]
                self.excluded["dt x"] += 1
                total = 0.0
                for n in range(A.shape[1]):
                    decay = torch.exp(dt[t, e] * A[e, n])
                    self.excluded["dt A"] += 1
                    self.excluded["exp"] += 1
                    state[e, n] = decay * state[e, n] + drive * Bmat[t, n]
                    total += Cmat[t, n] * state[e, n]
                    self.macs["scan"] += 3
                y[t, e] = total + D[e] * x[t, e]
                self.excluded["D x"] += 1
        return y

    # -- parts of a block, on (T, D) --

    def causal_conv(self, conv: nn.Conv1d, x: Tensor, reverse: bool) -> Tensor:
        width = conv.weight.shape[2]
        rows = x.T.flip(1) if reverse else x.T
        y = self.conv("conv", F.pad(rows, (width - 1, 0)), conv.weight, conv.bias)
        return F.silu(y.flip(1) if reverse else y).T

    def branch(self, mixer: nn.Module, ending: str, u: Tensor, reverse: bool) -> Tensor:
        """Project and scan one direction; ``ending`` is "" or "_b"."""
        x_proj, dt_proj = getattr(mixer, "x_proj" + ending), getattr(mixer, "dt_proj" + ending)
        A = decay_rates(getattr(mixer, f"A{ending}_log"))
        rank, states = dt_proj.weight.shape[1], A.shape[1]
        low, Bmat, Cmat = self.linear("x_proj", u, x_proj.weight).split([rank, states, states], dim=1)
        dt = F.softplus(self.linear("dt_proj", low, dt_proj.weight, dt_proj.bias))
        return self.scan(u, dt, A, Bmat, Cmat, getattr(mixer, "D" + ending), reverse)

    def mamba(self, mixer: Mamba, x: Tensor) -> Tensor:
        u, z = self.linear("in_proj", x, mixer.in_proj.weight).chunk(2, dim=1)
        y = self.branch(mixer, "", self.causal_conv(mixer.conv1d, u, mixer.reverse), mixer.reverse)
        return self.linear("out_proj", y * F.silu(z), mixer.out_proj.weight)

    def ext_bimamba(self, mixer: ExtBiMamba, x: Tensor) -> Tensor:
        ahead, back = self.mamba(mixer.forward_mamba, x), self.mamba(mixer.backward_mamba, x)
        if mixer.join is None:
            return ahead + back
        return self.linear("join", torch.cat([ahead, back], dim=1), mixer.join.weight, mixer.join.bias)

    def inn_bimamba(self, mixer: InnBiMamba, x: Tensor) -> Tensor:
        u, z = self.linear("in_proj", x, mixer.in_proj.weight).chunk(2, dim=1)
        ahead = back = self.causal_conv(mixer.conv1d, u, reverse=False)
        if mixer.conv1d_b is not None:
            back = self.causal_conv(mixer.conv1d_b, u, reverse=True)
        y = self.branch(mixer, "", ahead, reverse=False) + self.branch(mixer, "_b", back, reverse=True)
        return self.linear("out_proj", mixer.scale * y * F.silu(z), mixer.out_proj.weight)

    def mamba2(self, mixer: Mamba2, x: Tensor) -> Tensor:
        z, xBC, dt = self.linear("in_proj", x, mixer.in_proj.weight).split(mixer.splits, dim=1)
        u, Bmat, Cmat = self.causal_conv(mixer.conv1d, xBC, reverse=False).split(mixer.x_splits, dim=1)
        heads = (F.softplus(dt + mixer.dt_bias), decay_rates(mixer.A_log), mixer.D)
        dt, A, D = (value.repeat_interleave(mixer.head_dim, dim=-1) for value in heads)
        y = self.scan(u, dt, A[:, None].expand(-1, Bmat.shape[1]), Bmat, Cmat, D, reverse=False)
        return self.linear("out_proj", mixer.norm(y * F.silu(z)), mixer.out_proj.weight)

    def attention(self, mixer: SelfAttention, x: Tensor) -> Tensor:
        layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        projected = [self.linear("qkv_proj", x, layer.weight, layer.bias) for layer in layers]
        width = x.shape[1] // mixer.num_heads
        heads = []
        for queries, keys, values in zip(*(p.split(width, dim=1) for p in projected), strict=True):
            scores = self.linear("attention", queries, keys) / width**0.5  # pairs that a mask hides are multiplied too
            if mixer.causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            heads.append(self.linear("attention", scores.softmax(1), values.T))
        return self.linear("out_proj", torch.cat(heads, dim=1), mixer.out_proj.weight, mixer.out_proj.bias)

    def mixer(self, mixer: nn.Module, x: Tensor) -> Tensor:
        """Run any mixer of the table on ``x (T, D)``."""
        kinds = {Mamba: self.mamba, ExtBiMamba: self.ext_bimamba, InnBiMamba: self.inn_bimamba, Mamba2: self.mamba2}
        return kinds.get(type(mixer), self.attention)(mixer, x)

    def feed_forward(self, ffn: nn.Module, x: Tensor) -> Tensor:
        inner = ffn.activation(self.linear("feed_forward", x, ffn.up.weight, ffn.up.bias))
        return self.linear("feed_forward", inner, ffn.down.weight, ffn.down.bias)

    def conv_module(self, conv: nn.Module, x: Tensor) -> Tensor:
        first, last, middle = conv.pointwise_in, conv.pointwise_out, conv.depthwise
        inner = F.glu(self.linear("conv_module", x, first.weight, first.bias), dim=1)
        padded = F.pad(inner.T, (middle.padding[0], middle.padding[0]))
        inner = self.conv("conv_module", padded, middle.weight, middle.bias).T
        return self.linear("conv_module", F.silu(conv.norm(inner[None])[0]), last.weight, last.bias)

    def block(self, block: nn.Module, x: Tensor) -> Tensor:
        """Run a plain or a macaron block on ``x (T, D)``."""
        if isinstance(block, MacaronBlock):
            norms = block.norms
            x = x + 0.5 * self.feed_forward(block.ffn_in, norms[0](x))
            x = x + self.mixer(block.mixer, norms[1](x))
            x = x + self.conv_module(block.conv, norms[2](x))
            return norms[4](x + 0.5 * self.feed_forward(block.ffn_out, norms[3](x)))
        parts = [(lambda v: self.mixer(block.mixer, v), block.mixer_norm)]
        if block.ffn is not None:
            parts.append((lambda v: self.feed_forward(block.ffn, v), block.ffn_norm))
        for part, norm in parts:
            x = x + part(norm(x)) if block.pre_norm else norm(x + part(x))
        return x

    # -- whole models, on (S,) --

    @torch.no_grad()
    def hubert(self, model: HubertModel, wav: Tensor) -> Tensor:
        """Return the last hidden state ``(T, D)``."""
        x, norms = wav[None], model.front_end.norms
        for index, (conv, (_, _, stride)) in enumerate(
            zip(model.front_end.convs, model.config.conv_layers, strict=True)
        ):
            x = self.conv("front_end", x, conv.weight, stride=stride)
            x = F.gelu(norms[index](x[None])[0] if index < len(norms) else x)
        x = self.linear("projection", model.feature_norm(x.T), model.projection.weight, model.projection.bias)
        if model.position is not None:
            conv, pad = model.position.conv, (model.position.left, model.position.right)
            x = x + F.gelu(self.conv("position", F.pad(x.T, pad), conv.weight, conv.bias)).T
        x = model.encoder_norm(x)
        for block in model.blocks:
            x = self.block(block, x)
        return x

    @torch.no_grad()
    def ssamba(self, model: SsambaModel, wav: Tensor) -> Tensor:
        """Return the output ``(L, D)``; its filterbanks are the model's own and not counted."""
        features, grid = model.features(wav[None])
        bins, frames = model.config.patch_size
        patches = features[0].unflatten(1, (-1, frames)).unflatten(0, (-1, bins)).permute(0, 2, 1, 3).flatten(2)
        embedding = model.patch_embedding
        tokens = self.linear("projection", patches.flatten(0, 1), embedding.weight.flatten(1), embedding.bias)
        tokens = tokens + grid.positions(model.positions[1:], model.config.position_cut)[0]
        stream = torch.cat([(model.class_token + model.positions[0])[None], tokens])
        update = torch.zeros_like(stream)
        for ahead, back in zip(model.blocks[::2], model.blocks[1::2], strict=True):
            stream = stream + update
            update = self.mixer(ahead.mixer, ahead.norm(stream))
            update = update + self.mixer(back.mixer, back.norm(stream.flip(0))).flip(0)
            stream = 2 * stream if model.config.residual == "doubled" else stream
        return model.final_norm(stream + update)
