"""Several utterances in one row without padding, and the layers that must not look across their borders.

Whatever treats each frame by itself runs on the row as it is. What mixes frames gets the utterances side by side in a
padded batch, with their lengths, and its output is laid back into the row.
Letters: B utterances, T the longest, F frames of the row, the sum of all lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Packing:
    """Where the utterances of a row lie: one after the other, in order.

    Lengths that are on the CPU cost a GPU nothing: its host knows all shapes and places, and never waits for it.

    Args:
        lengths: frames of each utterance ``(B,)``, at least one of them above 0.
        device: where the rows are; default: where ``lengths`` is.
    """

    def __init__(self, lengths: Tensor, device: torch.device | str | None = None) -> None:
        host, device = lengths.cpu(), lengths.device if device is None else device
        self.longest, self.num_frames = int(host.max()), int(host.sum())
        self.shape = (len(host), self.longest)
        self.lengths = lengths.to(device, non_blocking=True)
        # from a frame's place in the row (F,) to that in the batch (B * T,)
        shift = torch.arange(len(host), device=device) * self.longest - (self.lengths.cumsum(0) - self.lengths)
        shifts = shift.repeat_interleave(self.lengths, output_size=self.num_frames)  # given, not asked of a GPU
        self.index = torch.arange(self.num_frames, device=device) + shifts

    @property
    def valid(self) -> Tensor:
        """``(B, T)`` bool, true where there is a frame."""
        return torch.arange(self.longest, device=self.lengths.device) < self.lengths[:, None]

    def pad(self, row: Tensor) -> Tensor:
        """Lay ``(1, F, ...)`` out as ``(B, T, ...)``, zeros in the padding."""
        batch = row.new_zeros(self.shape[0] * self.longest, *row.shape[2:])
        return batch.index_copy(0, self.index, row[0]).unflatten(0, self.shape)

    def pack(self, batch: Tensor) -> Tensor:
        """Lay the valid frames of ``(B, T, ...)`` one after the other, ``(1, F, ...)``."""
        return batch.flatten(0, 1).index_select(0, self.index)[None]


def slot_samples(num_samples: Tensor, downsample_rate: int) -> Tensor:
    """Return the room of each utterance in a packed row of audio: its samples, up to a whole number of frames' steps.

    Utterances that begin at multiples of the downsample rate keep their frames in every layer of the front end.
    """
    return (num_samples + downsample_rate - 1) // downsample_rate * downsample_rate


def pack_waveforms(wavs: list[Tensor], downsample_rate: int) -> Tensor:
    """Lay utterances ``(S_i,)`` one after the other in a row of audio ``(1, S)``, each in its slot, zeros behind it."""
    slots = slot_samples(torch.tensor([len(wav) for wav in wavs]), downsample_rate).tolist()
    row = wavs[0].new_zeros(1, sum(slots))
    begin = 0
    for wav, slot in zip(wavs, slots, strict=True):
        row[0, begin : begin + len(wav)] = wav
        begin += slot
    return row


Lengths = Tensor | Packing | None


def over_utterances(function: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, lengths: Lengths) -> Tensor:
    """Run ``function(x (B, T, ...), lengths (B,))``, which mixes frames, on a padded batch or on a packed row."""
    if isinstance(lengths, Packing):
        return lengths.pack(function(lengths.pad(x), lengths.lengths))
    return function(x, lengths)
