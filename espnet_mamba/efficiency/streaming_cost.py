"""What it costs to run a causal model chunk by chunk: time per chunk, bytes per stream, streams per core.

A chunk goes through the front end, the position convolution and the blocks with what each kept of the past; the
output is that of a pass over the whole recording.
Letters: B streams, S samples at 16 kHz, T frames at 50 Hz, D width, C channels.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from espnet_mamba.efficiency.timing import wall_time
from espnet_mamba.layers.attention import AttentionState
from espnet_mamba.models.hubert import SAMPLE_RATE, HubertModel

_LEAST_CALLS, _MOST_CALLS, _SECONDS = 10, 30, 0.5  # timed calls of a chunk: until half a second is over, within limits


class StreamRunner:
    """A model in eval mode with the state of B streams that run in step."""

    def __init__(self, model: HubertModel, num_streams: int = 1) -> None:
        """Start ``num_streams`` streams; ValueError for a model that needs the future."""
        if math.isinf(model.look_ahead_ms) or model.look_ahead_ms > 0:
            raise ValueError(f"{model.config.name}: look-ahead {model.look_ahead}; only causal models run in chunks")
        self.model = model.eval()
        config, like = model.config, model.mask_embedding
        inputs = [1] + [channels for channels, _, _ in config.conv_layers[:-1]]
        self.heard = [like.new_zeros(num_streams, channels, 0) for channels in inputs]
        self.frames: Tensor | None = None  # (B, D, kernel - 1) before the position convolution
        if model.position is not None:
            self.frames = like.new_zeros(num_streams, config.embed_dim, model.position.left)
        self.blocks: list[Any] = [block.mixer.start_state(num_streams) for block in model.blocks]

    @torch.inference_mode()
    def __call__(self, wavs: Tensor) -> Tensor:
        """Take the next samples ``(B, S)``; return the last layer of the frames that they complete, ``(B, T, D)``."""
        model = self.model
        x = self._front_end(wavs[:, None])
        x = model.projection(model.feature_norm(x.transpose(1, 2)))
        if self.frames is not None and x.shape[1]:
            seen = torch.cat([self.frames, x.transpose(1, 2)], 2)
            self.frames = seen[:, :, seen.shape[2] - self.frames.shape[2] :].clone()
            x = x + F.gelu(model.position.conv(seen)).transpose(1, 2)
        x = model.encoder_norm(x)
        if x.shape[1]:
            for index, block in enumerate(model.blocks):
                x, self.blocks[index] = block(x, None, self.blocks[index])
        return x

    def state_bytes(self) -> int:
        """Return the bytes that all streams together keep until the next chunk."""
        tensors = [*self.heard, *([] if self.frames is None else [self.frames]), *(t for s in self.blocks for t in s)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def assume_history(self, seconds: float) -> None:
        """Put random keys and values of so many seconds in place of attention's own; other states do not grow."""
        frames = round(seconds * SAMPLE_RATE / self.model.config.downsample_rate)
        for index, state in enumerate(self.blocks):
            if isinstance(state, AttentionState):
                shape = (*state.keys.shape[:2], frames, state.keys.shape[3])
                self.blocks[index] = AttentionState(torch.randn(shape), torch.randn(shape))

    def _front_end(self, x: Tensor) -> Tensor:
        """Turn ``(B, 1, S)`` into ``(B, C, T)``; every convolution keeps the inputs that its next output needs."""
        front_end = self.model.front_end
        for index, (conv, (_, kernel, stride)) in enumerate(zip(front_end.convs, front_end.conv_layers, strict=True)):
            x = torch.cat([self.heard[index], x], 2)
            outputs = max(0, (x.shape[2] - kernel) // stride + 1)
            self.heard[index] = x[:, :, outputs * stride :].clone()
            if not outputs:
                x = x.new_zeros(x.shape[0], front_end.conv_layers[index][0], 0)
                continue
            x = F.gelu(front_end.norms[index](conv(x)))
        return x


def streaming_costs(
    model: HubertModel, chunks_ms: Sequence[float], histories: Sequence[float], num_streams: Sequence[int] = (1, 8)
) -> list[dict[str, Any]]:
    """Return rows of the cost of a chunk on one core of the CPU.

    A row: chunk_ms, num_streams (in one batch), history_seconds, wall_median, wall_min, wall_max (seconds per chunk),
    rtf (per stream), streams_per_core (1 / rtf: as many keep up with the microphone), state_bytes (per stream),
    num_repeats. Where nothing grows with time the shortest history stands for all.
    """
    grows = any(isinstance(block.mixer.start_state(1), AttentionState) for block in model.blocks)
    lengths = histories if grows else histories[:1]
    with one_thread():
        return [
            _cost(model, chunk, history, streams)
            for streams in num_streams
            for history in lengths
            for chunk in chunks_ms
        ]


def _cost(model: HubertModel, chunk_ms: float, history: float, num_streams: int) -> dict[str, Any]:
    runner = StreamRunner(model, num_streams)
    first, step = model.config.receptive_field, round(chunk_ms * SAMPLE_RATE / 1000.0)
    runner(0.1 * torch.randn(num_streams, first))
    wavs = 0.1 * torch.randn(num_streams, step)
    walls: list[float] = []
    while len(walls) < _LEAST_CALLS + 3 or (sum(walls) < _SECONDS and len(walls) < _MOST_CALLS):
        runner.assume_history(history)  # every call finds the same past
        walls.append(wall_time(lambda: runner(wavs)))
    walls = walls[3:]  # warm-up
    median = statistics.median(walls)
    rtf = median / (num_streams * chunk_ms / 1000.0)
    return {
        "chunk_ms": chunk_ms,
        "num_streams": num_streams,
        "history_seconds": history,
        "wall_median": median,
        "wall_min": min(walls),
        "wall_max": max(walls),
        "rtf": rtf,
        "streams_per_core": 1.0 / rtf,
        "state_bytes": runner.state_bytes() // num_streams,
        "num_repeats": len(walls),
    }


def can_stream(model: nn.Module) -> bool:
    """Whether a model can run in chunks."""
    if not isinstance(model, HubertModel) or model.look_ahead_ms != 0:
        return False
    return all(hasattr(block.mixer, "start_state") for block in model.blocks)  # others' layers keep no state


@contextmanager
def one_thread() -> Iterator[None]:
    """Let PyTorch use one core inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
