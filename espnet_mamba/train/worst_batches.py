"""The largest batches of a run, tried before its first step: memory that is not enough shows now, not in a night."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from espnet_mamba.data.compact_table import read_lengths
from espnet_mamba.train.batch_reader import Request
from espnet_mamba.train.device_batches import num_samples_of, to_device

if TYPE_CHECKING:
    from espnet_mamba.train.trainer import TrainingRun

SAMPLE_RATE = 16000
GIB = 2**30
MOMENTS_BYTES = 8  # of a parameter: AdamW's two moments in float32, which come with the first update


class BatchSize(NamedTuple):
    """The audio of one batch as it is trained on, in samples."""

    total: int
    longest: int


def batch_size(lengths: Sequence[int], longest: int, packed: bool) -> BatchSize:
    """Return the size of a batch of utterances after cropping: to ``longest``, and unless packed to the shortest."""
    if not packed:
        length = min(longest, *lengths)
        return BatchSize(length * len(lengths), length)
    cropped = [min(longest, length) for length in lengths]
    return BatchSize(sum(cropped), max(cropped))


def worst_batches(
    batches: Sequence[Sequence[str]], lengths: Mapping[str, int], longest: int, packed: bool
) -> list[Sequence[str]]:
    """Return the batch of the most audio, and that of the most audio times length if it is another one.

    The second is the worse one where memory grows with the square of the length (attention without a fused kernel).
    """
    sizes = [batch_size([lengths[utt_id] for utt_id in batch], longest, packed) for batch in batches]
    most = max(range(len(sizes)), key=lambda i: (sizes[i].total, sizes[i].longest))
    steep = max(range(len(sizes)), key=lambda i: (sizes[i].total * sizes[i].longest, sizes[i].total))
    return [batches[i] for i in dict.fromkeys((most, steep))]


def try_worst_batches(run: TrainingRun, factory: Any) -> None:
    """Run the largest batches of this process forward and backward, and print the memory that they took.

    Nothing of it stays: no update is made, no gradient kept, and random state and running statistics are put back.

    Args:
        run: before its first step.
        factory: of the training batches: ``batches``, among which the largest are, and ``reader``.

    Raises:
        ValueError: there is not enough memory; the message names the batch and the remedy.
    """
    options = run.options
    ids, samples = read_lengths(options.train_shape_file[0])
    lengths = dict(zip((utt_id.decode() for utt_id in ids), samples.tolist(), strict=True))
    packed = options.batch_type == "packed"
    for utt_ids in worst_batches(factory.batches, lengths, options.max_crop_samples, packed):
        batch = factory.reader.__getitems__(Request(0, 1, utt_ids, ())).batch
        if batch is None:  # training itself says what cannot be read
            continue
        sizes = num_samples_of(batch)
        seconds = sum(sizes) / SAMPLE_RATE
        what = f"{len(sizes)} utterances of up to {max(sizes) / SAMPLE_RATE:.3g} s, {seconds:.4g} s of audio"
        started = time.perf_counter()
        try:
            peak = _peak_bytes(run, batch)
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            less = "" if options.activation_checkpointing else ", or give --activation_checkpointing true"
            raise ValueError(
                f"out of memory in the largest batch, before the first step: {what} on one device"
                f"{_device_memory(run.device)}; lower --batch_bins (now {options.batch_bins}), raising --accum_grad "
                f"to keep an update's audio{less}"
            ) from error
        moments = MOMENTS_BYTES * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
        logging.info(
            f"worst batches first: {what}: peak memory {peak / GIB:.3g} GiB{_device_memory(run.device)}, "
            f"{moments / GIB:.3g} GiB more with AdamW's moments; {time.perf_counter() - started:.3g} s"
        )


def _peak_bytes(run: TrainingRun, batch: dict[str, torch.Tensor]) -> int:
    """Return the most memory in use while a batch goes forward and back: PyTorch's on CUDA, else the process's."""
    cuda = run.device == "cuda"
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    was_training = run.model.training
    run.model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if cuda else []):
            with torch.autocast(run.device, torch.bfloat16, enabled=run.options.use_amp):
                sums = run.model.sums(**to_device(batch, run.device))
            # not .backward(): DDP listens to that, and would want it of all processes
            gradients = torch.autograd.grad(run.model.loss(sums), parameters, allow_unused=True)
            del gradients, sums
            if cuda:
                torch.cuda.synchronize()
    finally:
        run.model.train(was_training)
        for buffer, before in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    if cuda:
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _device_memory(device: str) -> str:
    return f" of {torch.cuda.get_device_properties('cuda').total_memory / GIB:.3g} GiB" if device == "cuda" else ""
