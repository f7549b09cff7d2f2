"""Patches of several utterances in one batch: between their place in the spectrogram and their place in the sequence.

The sequence is frequency-major: token ``band * C + column`` for an utterance of C columns, so that neighbours in the
sequence are neighbours in time inside one band. In a padded batch the valid patches of an utterance are therefore not
a prefix of the flattened grid; they are gathered into one, their order kept, and everything behind it is padding.
Letters: B utterances, G bands, C columns of the longest utterance, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def num_patch_columns(num_frames: int, frames_per_patch: int) -> int:
    """Return the columns of patches that ``num_frames`` frames begin; the last one may not be full."""
    return -(-num_frames // frames_per_patch)


class PatchGrid:
    """The patches of a batch: each utterance has ``num_bands`` bands and its own number of columns."""

    def __init__(self, num_columns: Sequence[int], num_bands: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.num_bands, self.total = list(num_columns), num_bands, max(num_columns)
        self.num_columns = torch.tensor(self.columns, device=device)  # (B,)
        self.padded = min(self.columns) < self.total

    @property
    def valid(self) -> Tensor:
        """``(B, G, C)`` bool, true where a patch belongs to an utterance."""
        columns = torch.arange(self.total, device=self.num_columns.device)
        return (columns < self.num_columns[:, None, None]).expand(-1, self.num_bands, -1)

    def sequence_lengths(self, extra: int = 0) -> Tensor | None:
        """Return valid tokens ``(B,)`` with ``extra`` more in front; None when nothing is padded."""
        return self.num_bands * self.num_columns + extra if self.padded else None

    def to_sequence(self, patches: Tensor) -> Tensor:
        """Turn ``(B, G, C, ...)`` into sequences ``(B, G * C, ...)`` whose valid tokens come first; the rest is 0."""
        flat = patches.flatten(1, 2)
        if not self.padded:
            return flat
        token = torch.arange(self.num_bands * self.total, device=flat.device)
        columns = self.num_columns[:, None].clamp(min=1)
        band, column = token // columns, token % columns  # (B, G * C)
        keep = band < self.num_bands
        source = torch.where(keep & (self.num_columns[:, None] > 0), band * self.total + column, 0)
        return _pick(flat, source, keep & (self.num_columns[:, None] > 0))

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Undo ``to_sequence``: ``(B, G * C, ...)`` to ``(B, G, C, ...)``, 0 where there is no patch."""
        shape = (len(tokens), self.num_bands, self.total, *tokens.shape[2:])
        if not self.padded:
            return tokens.reshape(shape)
        band = torch.arange(self.num_bands, device=tokens.device)[:, None]
        column = torch.arange(self.total, device=tokens.device)
        token = band * self.num_columns[:, None, None] + column
        valid = self.valid
        return _pick(tokens, torch.where(valid, token, 0).flatten(1), valid.flatten(1)).reshape(shape)

    def to_columns(self, tokens: Tensor, join: str = "concat") -> Tensor:
        """Turn sequences ``(B, G * C, D)`` into one vector per column of time.

        Args:
            tokens: as ``to_sequence`` orders them.
            join: ``concat`` (bands side by side, lowest first: ``(B, C, G * D)``) or ``mean`` (``(B, C, D)``).

        Raises:
            ValueError: another ``join``.
        """
        grid = self.to_grid(tokens)
        if join == "concat":
            return grid.transpose(1, 2).flatten(2)
        if join == "mean":
            return grid.mean(1)
        raise ValueError(f"frames: {join!r} is not one of: concat mean")

    def positions(self, learned: Tensor, cut: str) -> Tensor:
        """Return each token's position ``(B, G * C, D)`` from the learned ones ``(G * P, D)``.

        An utterance of at most P columns takes as many of them, from the first on or (``cut="centre"``) around the
        middle; a longer one interpolates the P linearly over its own time. Batch mates play no part.
        """
        width = learned.shape[-1]
        grid = learned.view(self.num_bands, -1, width)  # (G, P, D)
        known = {columns: self._resized(grid, columns, cut) for columns in set(self.columns)}
        rows = [F.pad(known[c].flatten(0, 1), (0, 0, 0, self.num_bands * (self.total - c))) for c in self.columns]
        return torch.stack(rows)

    @staticmethod
    def _resized(grid: Tensor, columns: int, cut: str) -> Tensor:
        """Return ``(G, columns, D)`` from ``grid (G, P, D)``."""
        available = grid.shape[1]
        if columns <= available:
            first = 0 if cut == "start" else available // 2 - columns // 2
            return grid[:, first : first + columns]
        return F.interpolate(grid.transpose(1, 2), size=columns, mode="linear").transpose(1, 2)


class Reversal:
    """Reverses each sequence of a batch over its own length and leaves the padding where it is."""

    def __init__(self, lengths: Tensor | None, total: int) -> None:
        self.index = None
        if lengths is not None:
            token = torch.arange(total, device=lengths.device)
            back = lengths[:, None] - 1 - token
            self.index = torch.where(back >= 0, back, token)  # (B, total)

    def __call__(self, x: Tensor) -> Tensor:
        """Reverse ``x (B, total, D)``."""
        return x.flip(1) if self.index is None else x.gather(1, self.index[..., None].expand_as(x))


def _pick(x: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    """Return ``x[b, index[b, n]]`` where ``keep (B, N)``, else 0; x is ``(B, M, ...)``."""
    trailing = (1,) * (x.dim() - 2)
    picked = x.gather(1, index.view(*index.shape, *trailing).expand(*index.shape, *x.shape[2:]))
    return picked.masked_fill(~keep.view(*keep.shape, *trailing), 0)
