"""Multiply-accumulates of a model's forward pass, by formula, part by part.

A MAC is one multiplication with the addition that takes its result: 2 FLOP. Counted: convolutions (taps that meet the
zeros around a sequence too), linear layers, attention's two products over all pairs of frames, and of the scan
``SCAN_MACS`` per frame, channel and state: (dt x) times B, decay times h plus that, C times h summed.
Not counted, though tests count them one by one: the scan's dt A and its exponential, one each per frame, channel and
state; dt x and D x, one each per frame and channel. Nor norms, activations, softmax, gates, biases, residuals.
Most counters read the scan as 0 (``macs_counters``). Mamba's authors give 9 FLOP for a parallel, associative scan
(state-spaces/mamba#110) where a recurrence needs these 6.
Of SSAMBA's filterbanks the product with the mel filters counts; the Fourier transform, which has no agreed number of
MACs, does not: at 5/2 N log2 N FLOP for N = 512 real values it would be about a sixth of that product.
Letters: S samples at 16 kHz, T frames at 50 Hz, D width, E = expand * D, N states, R rank of dt, K classes, M masked
patches, P values in a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.features import WINDOW, num_fbank_frames
from espnet_mamba.models.ssamba.grid import num_patch_columns

SAMPLE_RATE = 16000
FLOP_PER_MAC = 2
SCAN_MACS = 3
MEL_INPUTS = 257  # powers of a 512-point transform that Kaldi's mel filters read
HEAD_DIM = 256


def count_macs(config: HubertConfig, num_samples: int, num_classes: int = 0) -> dict[str, int]:
    """Return part -> MACs for one utterance of ``num_samples``; the pretraining head only with ``num_classes``.

    ValueError when the audio is shorter than one frame or the mixer has no formula.
    """
    if num_samples < config.receptive_field:
        raise ValueError(
            f"{num_samples} samples are shorter than one frame ({config.receptive_field} samples); give a longer length"
        )
    front_end, frames = _front_end(config, num_samples)
    width = config.embed_dim
    parts = {"front_end": front_end, "projection": frames * config.conv_layers[-1][0] * width}
    if config.position != "none":
        parts["position"] = frames * width * (width // config.position_groups) * config.position_kernel
    if config.mixer not in MIXER_MACS:
        raise ValueError(f"mixer {config.mixer!r} has no formula; known: {' '.join(MIXER_MACS)}; add it to MIXER_MACS")
    parts |= {name: config.num_layers * macs for name, macs in MIXER_MACS[config.mixer](config, frames).items()}
    if config.ffn_dim:
        parts["feed_forward"] = config.num_layers * frames * 2 * width * config.ffn_dim
    if config.block == "macaron":
        parts["feed_forward"] *= 2
        parts["conv_module"] = config.num_layers * frames * width * (3 * width + config.conv_module_kernel)
    if num_classes:
        parts["head"] = frames * HEAD_DIM * (width + num_classes)
    return parts


def count_ssamba_macs(config: SsambaConfig, num_samples: int, heads: bool = False) -> dict[str, int]:
    """Return part -> MACs of one pass of SSAMBA for one utterance of ``num_samples``.

    Args:
        config: the model.
        num_samples: of the utterance.
        heads: whether to add pretraining's two heads on the masked patches, and the products of its contrast.

    Raises:
        ValueError: audio shorter than one frame.
    """
    if num_samples < WINDOW:
        raise ValueError(f"{num_samples} samples are shorter than one frame ({WINDOW} samples); give a longer length")
    frames, width, pixels = num_fbank_frames(num_samples), config.embed_dim, config.patch_pixels
    patches = config.num_bands * num_patch_columns(frames, config.patch_size[1])
    parts = {"front_end": frames * MEL_INPUTS * config.num_mel_bins, "projection": patches * pixels * width}
    parts |= {name: config.depth * macs for name, macs in _inn_bimamba(config, 1 + patches).items()}
    if heads:
        masked = max(1, round(patches * config.mask_patches / config.num_patches))
        parts["head"] = 2 * masked * width * (width + pixels) + masked * masked * pixels
    return parts


def shortest_samples(config: HubertConfig | SsambaConfig) -> int:
    """Return the samples below which a model has no frame."""
    return WINDOW if isinstance(config, SsambaConfig) else config.receptive_field


def macs_per_second(config: HubertConfig | SsambaConfig, seconds: float) -> dict[str, float]:
    """Return part -> MACs per second of audio at a length in seconds, without the head."""
    parts = count_macs_of(config, round(seconds * SAMPLE_RATE))
    return {name: macs / seconds for name, macs in parts.items()}


def count_macs_of(config: HubertConfig | SsambaConfig, num_samples: int) -> dict[str, int]:
    """Return part -> MACs of either kind of model for one utterance of ``num_samples``, without its head."""
    count = count_ssamba_macs if isinstance(config, SsambaConfig) else count_macs
    return count(config, num_samples)


def _front_end(config: HubertConfig, num_samples: int) -> tuple[int, int]:
    """Return the MACs of the convolutions over samples, and T."""
    total, length, inner = 0, num_samples, 1
    for channels, kernel, stride in config.conv_layers:
        length = (length - kernel) // stride + 1
        total += length * inner * channels * kernel
        inner = channels
    return total, length


def _mamba(config: HubertConfig | SsambaConfig, frames: int) -> dict[str, int]:
    width, states = config.embed_dim, config.state_size
    inner, rank = config.expand * width, math.ceil(width / 16)
    return {
        "in_proj": frames * width * 2 * inner,
        "conv": frames * inner * config.conv_kernel,
        "x_proj": frames * inner * (rank + 2 * states),
        "dt_proj": frames * rank * inner,
        "scan": frames * inner * states * SCAN_MACS,
        "out_proj": frames * inner * width,
    }


def _ext_bimamba(config: HubertConfig, frames: int) -> dict[str, int]:
    parts = {name: 2 * macs for name, macs in _mamba(config, frames).items()}
    if config.join == "concat_linear":
        parts["join"] = frames * 2 * config.embed_dim * config.embed_dim
    return parts


def _inn_bimamba(config: HubertConfig | SsambaConfig, frames: int) -> dict[str, int]:
    twice = {"x_proj", "dt_proj", "scan"} | (set() if config.share_conv else {"conv"})
    return {name: macs * (2 if name in twice else 1) for name, macs in _mamba(config, frames).items()}


def _mamba2(config: HubertConfig, frames: int) -> dict[str, int]:
    width, states = config.embed_dim, config.state_size
    inner = config.expand * width
    return {
        "in_proj": frames * width * (2 * inner + 2 * states + inner // config.head_dim),
        "conv": frames * (inner + 2 * states) * config.conv_kernel,
        "scan": frames * inner * states * SCAN_MACS,
        "out_proj": frames * inner * width,
    }


def _attention(config: HubertConfig, frames: int) -> dict[str, int]:
    """Both products over all pairs of frames: a causal kernel may skip half of them, PyTorch's counter does not."""
    width = config.embed_dim
    return {"qkv_proj": frames * 3 * width * width, "attention": 2 * frames * frames * width} | {
        "out_proj": frames * width * width
    }


# mixer -> MACs of one block, by part; the same keys as layers.block.MIXERS.
MIXER_MACS: dict[str, Callable[[HubertConfig, int], dict[str, int]]] = {
    "mamba": _mamba,
    "extbimamba": _ext_bimamba,
    "innbimamba": _inn_bimamba,
    "mamba2": _mamba2,
    "attention": _attention,
    "causal_attention": _attention,
}
