"""SSAMBA's encoder: patches of a spectrogram in, one hidden state per pair of blocks out.

Two mechanisms look both ways in time, and both are on together: each mixer runs its own two scans and averages them
(Vision Mamba's "v2"), and every second block reads the reversed sequence.
Letters: B utterances, S samples at 16 kHz, G bands, C columns of patches, L = 1 + G * C tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espnet_mamba.layers.innbimamba import InnBiMamba
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.features import batch_features
from espnet_mamba.models.ssamba.grid import PatchGrid, Reversal


class SsambaOutput(NamedTuple):
    """What a pass over a batch gives. Token 0 is the class token, then come the patches, frequency-major."""

    hidden_states: list[Tensor]  # depth / 2 + 1 tensors (B, L, D); [0] enters pair 1, [i] is the stream after pair i
    output: Tensor  # (B, L, D), the last stream after the final norm: what the heads read
    grid: PatchGrid  # the patches of each utterance, and the way back to columns of time
    directions: list[tuple[Tensor, Tensor]]  # per pair, if asked for: both blocks' outputs (B, L, D), in token order


class SsambaBlock(nn.Module):
    """``Mixer(LN(x))``; the residual is the caller's."""

    def __init__(self, config: SsambaConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.embed_dim)
        self.mixer = InnBiMamba(config.embed_dim, **config.mixer_options())
        with torch.no_grad():
            self.mixer.out_proj.weight /= math.sqrt(config.depth)  # Vision Mamba's, so that the stream starts calm
            if config.dt_bias_backward == "zero":
                self.mixer.dt_proj_b.bias.zero_()

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Map ``x (B, L, D)`` to ``(B, L, D)``, 0 behind ``lengths (B,)``."""
        return self.mixer(self.norm(x), lengths)[0]


class SsambaModel(nn.Module):
    """Patch embedding, positions, pairs of blocks, final norm. Padding and batch mates never change its output."""

    def __init__(self, config: SsambaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.patch_embedding = nn.Conv2d(1, width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(1 + config.num_patches, width))  # [0] is the class token's
        self.mask_embedding = nn.Parameter(torch.randn(width) * math.sqrt(2 / (width + 1)))
        self.blocks = nn.ModuleList(SsambaBlock(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(width)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for parameter in (self.class_token, self.positions, self.mask_embedding):
            parameter._no_weight_decay = True
        # [i] drops what enters block i, the output of the pair before; [depth] what enters the final norm
        self.drop_rates = [0.0] + [config.drop_path * i / (config.depth - 1) for i in range(config.depth)]

    def forward(
        self,
        wavs: Tensor,
        num_samples: Tensor | None = None,
        patch_mask: Tensor | None = None,
        directions: bool = False,
    ) -> SsambaOutput:
        """Encode a batch of any lengths.

        Args:
            wavs: ``(B, S)`` in [-1, 1].
            num_samples: valid samples ``(B,)``; None when every row is full.
            patch_mask: ``(B, G, C)`` bool, patches that the mask embedding replaces; None for none.
            directions: also return both blocks' outputs of every pair.
        """
        return self.encode(*self.features(wavs, num_samples), patch_mask, directions)

    def features(self, wavs: Tensor, num_samples: Tensor | None = None) -> tuple[Tensor, PatchGrid]:
        """Return a batch's spectrograms ``(B, num_mel_bins, frames)``, filled up to whole patches, and their grid."""
        config = self.config
        features, columns = batch_features(wavs, num_samples, config.num_mel_bins, config.patch_size[1])
        return features, PatchGrid(columns, config.num_bands, wavs.device)

    def encode(
        self, features: Tensor, grid: PatchGrid, patch_mask: Tensor | None = None, directions: bool = False
    ) -> SsambaOutput:
        """Do what ``forward`` does from the point where the spectrograms ``(B, num_mel_bins, frames)`` are known."""
        if grid.total:
            patches = self.patch_embedding(features[:, None]).permute(0, 2, 3, 1)  # (B, G, C, D)
        else:
            patches = features.new_zeros(len(features), grid.num_bands, 0, self.config.embed_dim)
        if patch_mask is not None:
            patches = torch.where(patch_mask[..., None], self.mask_embedding.to(patches.dtype), patches)
        tokens = grid.to_sequence(patches) + grid.positions(self.positions[1:], self.config.position_cut)
        first = (self.class_token + self.positions[0]).expand(len(tokens), 1, -1)
        return self._run_blocks(torch.cat([first, tokens], dim=1), grid, directions)

    def _run_blocks(self, stream: Tensor, grid: PatchGrid, keep_directions: bool) -> SsambaOutput:
        lengths = grid.sequence_lengths(extra=1)
        reverse = Reversal(lengths, stream.shape[1])
        doubled = self.config.residual == "doubled"
        hidden_states, directions, update = [stream], [], None
        for pair in range(self.config.depth // 2):
            ahead_stream = self._add(stream, update, 2 * pair)
            # the published code drops paths in either direction apart and then adds the streams as well
            back_stream = self._add(stream, update, 2 * pair + 1) if doubled else ahead_stream
            ahead = self.blocks[2 * pair](ahead_stream, lengths)
            back = reverse(self.blocks[2 * pair + 1](reverse(back_stream), lengths))
            if keep_directions:
                directions.append((ahead, back))
            update = ahead + back
            stream = ahead_stream + back_stream if doubled else ahead_stream
            hidden_states.append(stream + update)
        output = self.final_norm(self._add(stream, update, self.config.depth))
        return SsambaOutput(hidden_states, output, grid, directions)

    def _add(self, stream: Tensor, update: Tensor | None, place: int) -> Tensor:
        """Add the last pair's output, dropped for whole utterances in training (stochastic depth)."""
        rate = self.drop_rates[place] if self.training else 0.0
        if update is None:
            return stream
        if rate:
            kept = torch.rand(len(update), 1, 1, device=update.device) >= rate
            update = update * kept / (1 - rate)
        return stream + update

    def extract_features(
        self, wavs: Tensor, num_samples: Tensor | None = None, frames: str = "concat"
    ) -> tuple[list[Tensor], Tensor]:
        """Return hidden states by columns of time (160 ms each) and their lengths ``(B,)``, unmasked.

        There are ``depth / 2 + 1``: the embedding and one per pair. The last one has passed the final norm, as the
        published S3PRL expert returns it (and it alone).

        Args:
            wavs: ``(B, S)``.
            num_samples: valid samples ``(B,)`` or None.
            frames: ``concat`` puts a column's bands side by side, as that expert does: ``(B, C, G * D)``; ``mean``
                averages them: ``(B, C, D)``.
        """
        output = self(wavs, num_samples)
        states = [*output.hidden_states[:-1], output.output]
        return [output.grid.to_columns(state[:, 1:], frames) for state in states], output.grid.num_columns

    @property
    def look_ahead_ms(self) -> float:
        """Infinite: every block reads the whole utterance."""
        return math.inf
