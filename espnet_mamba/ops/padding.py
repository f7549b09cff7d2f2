"""Which frames are padding."""

from __future__ import annotations

import torch
from torch import Tensor


def padding_mask(lengths: Tensor | None, num_frames: int) -> Tensor | None:
    """Return ``(B, num_frames, 1)``, true where a frame is padding; None when nothing is padded.

    On a GPU the answer is a mask even for full batches: to look would stop the host until the device has caught up.
    """
    if lengths is None or (lengths.device.type == "cpu" and bool((lengths >= num_frames).all())):
        return None
    return (torch.arange(num_frames, device=lengths.device) >= lengths[:, None])[..., None]


def checked_lengths(name: str, lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``lengths`` as int64 on x's device, or None when every frame of ``x (B, T, ...)`` is valid.

    Args:
        name: the caller, for messages.
        lengths: valid frames ``(B,)``, integers from 0 to T; on the CPU or with x.
        x: ``(B, T, ...)``.

    Raises:
        ValueError: a wrong shape or type; a length below 0 or above T (looked at only where that is free, on the CPU;
            on a GPU such lengths are clipped).
    """
    if lengths is None:
        return None
    num_utterances, num_frames = x.shape[:2]
    if tuple(lengths.shape) != (num_utterances,):
        raise ValueError(f"{name}: lengths has shape {tuple(lengths.shape)}, expected ({num_utterances},)")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"{name}: lengths is {lengths.dtype}, expected integers (frames)")
    if lengths.device.type == "cpu":
        wrong = ((lengths < 0) | (lengths > num_frames)).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(f"{name}: lengths[{row}] is {int(lengths[row])}, expected 0 to {num_frames} frames")
        if bool((lengths == num_frames).all()):
            return None
    return lengths.to(x.device, torch.int64).clamp(0, num_frames)
