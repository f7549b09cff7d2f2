"""Which frames the model must predict without seeing them: spans, drawn on the device in one go (docs/papers.md 5)."""

from __future__ import annotations

import torch
from torch import Tensor


def span_mask(
    num_frames: Tensor,
    total_frames: int,
    probability: float = 0.8,
    span: int = 10,
    min_spans: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw spans of masked frames that may overlap, as HuBERT does.

    An utterance of n frames gets ``probability * n / span`` spans (rounded at random, so that the mean is kept) with
    distinct starts; probability 0.8 and span 10 mask about 55 % of all frames.

    Args:
        num_frames: valid frames ``(B,)``; padding is never masked.
        total_frames: T of the batch.
        probability: expected masked fraction if spans did not overlap.
        span: frames of a span.
        min_spans: least number of spans (fewer where an utterance has not that many starts).
        generator: source of randomness on ``num_frames``'s device.

    Returns:
        ``(B, T)`` bool, true where masked.
    """
    device = num_frames.device
    starts = (num_frames - span + 1).clamp(min=1)  # an utterance shorter than a span is masked from its first frame
    rounding = torch.rand(num_frames.shape, generator=generator, device=device)
    wanted = (probability * num_frames / span + rounding).floor().long()
    wanted = torch.minimum(wanted.clamp(min=min_spans), starts)
    scores = torch.rand(len(num_frames), total_frames, generator=generator, device=device)
    frames = torch.arange(total_frames, device=device)
    scores = scores.masked_fill(frames >= starts[:, None], -1.0)
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    is_start = rank < wanted[:, None]
    counts = torch.nn.functional.pad(is_start.long().cumsum(1), (span, 0))
    covered = counts[:, span:] > counts[:, :-span]  # a start among the last `span` frames
    return covered & (frames < num_frames[:, None])
