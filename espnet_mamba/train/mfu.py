"""Model FLOPs utilisation: the arithmetic that a step's audio needs, over what the device could have done meanwhile.

A step needs three forward passes' worth (the backward pass counts twice), 2 FLOP per multiply-accumulate of
``models.macs``. Work that only this run does, such as computing activations twice, is not in it; nor is HuBERT's head
(under 0.3 % of Base), whose frames are drawn at random. A layer that is dropped does no work: its expected share is
taken out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import torch

from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.macs import FLOP_PER_MAC, count_macs, count_ssamba_macs, shortest_samples
from espnet_mamba.models.ssamba.config import SsambaConfig

STEP_PASSES = 3
OUTSIDE_BLOCKS = ("front_end", "projection", "position")
# Dense TFLOP/s of bfloat16 with float32 sums, of TF32, and of float32 outside the tensor cores, from NVIDIA's data
# sheets (half of what they give "with sparsity"). The first whose words stand in the name that CUDA gives wins.
PEAKS = {
    "B200": (2250.0, 1100.0, 75.0),
    "H200 NVL": (835.0, 417.0, 60.0),
    "H200": (989.0, 494.0, 67.0),
    "GH200": (989.0, 494.0, 67.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "RTX A6000": (154.8, 77.4, 38.7),
    "A40": (149.7, 74.8, 37.4),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}


def peak_flops(device: str, use_amp: bool, given_tflops: float | None = None) -> float | None:
    """Return a device's peak in FLOP/s for the type of its matrix products; None where it is not known.

    Args:
        device: ``cuda`` for the present GPU; a CPU's peak is not known.
        use_amp: whether products are in bfloat16.
        given_tflops: what the user says it is.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if not device.startswith("cuda"):
        return None
    return listed_peak(torch.cuda.get_device_name(), use_amp, torch.backends.cuda.matmul.allow_tf32)


def listed_peak(name: str, use_amp: bool, tf32: bool) -> float | None:
    """Return the peak in FLOP/s of the GPU called ``name`` (as CUDA calls it), or None if it is not in the list."""
    if re.search(r"laptop|max-q|\bmig\b|4090 d\b", name, re.IGNORECASE):  # a smaller one, or a part of one
        return None
    column = 0 if use_amp else 1 if tf32 else 2
    found = (peaks for words, peaks in PEAKS.items() if re.search(rf"\b{words}\b", name, re.IGNORECASE))
    return next((peaks[column] * 1e12 for peaks in found), None)


def step_flops(config: HubertConfig | SsambaConfig, num_samples: Sequence[int]) -> float:
    """Return the FLOPs that a training step on utterances of these lengths, in samples, needs."""
    return STEP_PASSES * FLOP_PER_MAC * sum(forward_macs(config, length) for length in num_samples)


@functools.lru_cache(maxsize=65536)
def forward_macs(config: HubertConfig | SsambaConfig, num_samples: int) -> float:
    """Return the expected MACs of the forward pass of a training step on one utterance; none below one frame."""
    if num_samples < shortest_samples(config):
        return 0.0
    if isinstance(config, SsambaConfig):  # a pass for each loss, on the same spectrograms
        parts = count_ssamba_macs(config, num_samples, heads=True)
        once = parts["front_end"] + parts["head"]
        return once + config.mask_passes * (sum(parts.values()) - once)
    parts = count_macs(config, num_samples)
    outside = sum(parts.get(name, 0) for name in OUTSIDE_BLOCKS)
    return outside + (1 - config.layer_drop) * (sum(parts.values()) - outside)
