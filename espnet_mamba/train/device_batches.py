"""A batch on its way to the device: what shapes the work stays with the host, which then never has to ask for it."""

from __future__ import annotations

from torch import Tensor

HOST = ("num_samples",)  # read by the model on the CPU, and copied to the device where a kernel wants it


def to_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """Return ``batch`` with its tensors on ``device``, lengths excepted; the host does not wait for the copies."""
    return {name: value if name in HOST else value.to(device, non_blocking=True) for name, value in batch.items()}


def num_samples_of(batch: dict[str, Tensor]) -> list[int]:
    """Return the samples of each utterance; ``speech (B, S)`` says it where nothing is padded or packed."""
    speech = batch["speech"]
    return batch["num_samples"].tolist() if "num_samples" in batch else [speech.shape[1]] * len(speech)
