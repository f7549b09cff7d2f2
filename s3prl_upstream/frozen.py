"""A frozen upstream that computes each utterance once.

B utterances, S samples at 16 kHz, T frames, D width, L layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence


class FrozenUpstream(nn.Module):
    """Stands where an ``S3PRLUpstream`` stood: no gradient, always in evaluation mode, layers remembered per waveform.

    An upstream that never changes gives the same layers for the same samples, so over the epochs of a training only
    the first pass computes. Waveforms are told apart by a 128-bit digest; when ``cache_mb`` is full, further
    utterances are computed each time.
    """

    def __init__(self, upstream: nn.Module, cache_mb: float = 1024.0) -> None:
        super().__init__()
        self.upstream = upstream.requires_grad_(False).eval()
        self.cache_bytes = int(cache_mb * 2**20)
        self.clear()
        self.training = False
        self._register_load_state_dict_pre_hook(self._forget)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.upstream.num_layers

    @property
    def hidden_sizes(self) -> list[int]:
        """Width D of each layer."""
        return self.upstream.hidden_sizes

    @property
    def downsample_rates(self) -> list[int]:
        """Samples per frame of each layer."""
        return self.upstream.downsample_rates

    def clear(self) -> None:
        """Forget all remembered layers."""
        self.cache: dict[bytes, Tensor] = {}
        self.used_bytes = 0

    def train(self, mode: bool = True) -> FrozenUpstream:
        """Stay in evaluation mode whatever ``mode`` says."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, wavs: Tensor, wavs_len: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Map (B, S) and (B,) to L tensors (B, T, D), zero behind each end, and L tensors (B,) of lengths."""
        if wavs.dim() == 3:
            wavs = wavs.squeeze(-1)
        keys = [_digest(wav[:length]) for wav, length in zip(wavs, wavs_len.tolist(), strict=True)]
        fresh = self._compute(wavs, wavs_len, [i for i, key in enumerate(keys) if key not in self.cache])
        layers = [fresh[i] if i in fresh else self.cache[key] for i, key in enumerate(keys)]
        for i, features in fresh.items():
            self._remember(keys[i], features)
        lengths = torch.tensor([features.size(0) for features in layers], device=wavs.device)
        batch = pad_sequence(layers, batch_first=True)  # (B, T, L, D)
        return list(batch.unbind(2)), [lengths] * self.num_layers

    def _compute(self, wavs: Tensor, wavs_len: Tensor, rows: list[int]) -> dict[int, Tensor]:
        """Return (T, L, D) for each of ``rows``, computed in one batch."""
        if not rows:
            return {}
        layers, lengths = self.upstream(wavs[rows, : int(wavs_len[rows].max())], wavs_len[rows])
        stacked = torch.stack(list(layers), dim=2)  # (B, T, L, D)
        return {row: stacked[i, :length] for i, (row, length) in enumerate(zip(rows, lengths[0].tolist(), strict=True))}

    def _remember(self, key: bytes, features: Tensor) -> None:
        size = features.numel() * features.element_size()
        if key not in self.cache and self.used_bytes + size <= self.cache_bytes:
            self.cache[key] = features.clone()  # a view would keep the whole batch alive
            self.used_bytes += size

    def _forget(self, *_: Any) -> None:
        self.clear()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenUpstream:
        # Both trainers move the model to its own device again and again: only a real move makes the layers useless.
        before = self._place()
        super()._apply(fn, recurse)
        if self._place() != before:
            self.clear()
        return self

    def _place(self) -> set[tuple[torch.device, torch.dtype]]:
        return {(parameter.device, parameter.dtype) for parameter in self.upstream.parameters()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}, "used_bytes": 0}


def _digest(wav: Tensor) -> bytes:
    return hashlib.blake2b(wav.detach().cpu().contiguous().numpy(), digest_size=16).digest()
