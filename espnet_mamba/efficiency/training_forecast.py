"""What a pretraining run will take: hours, GPU-hours and memory, from one measured step of a short batch, or from MACs.

Everything here is an estimate. Time follows MACs: a step's rate in MAC per second, measured on this machine or taken as
a share of a GPU's peak, divides those of the whole run. Memory is that of weights, gradients and AdamW's two moments in
float32 plus activations, which are proportional to the seconds of audio in a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from espnet_mamba.efficiency.macs import FLOP_PER_MAC, SAMPLE_RATE, count_macs_of
from espnet_mamba.efficiency.memory import peak_memory_mb
from espnet_mamba.efficiency.timing import make_call, wall_time
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.model import SsambaModel

STEP_PASSES = 3  # forward, and backward at twice its cost
STATE_BYTES = 16  # of a parameter: weight, gradient, two moments of AdamW, 4 bytes each
SHORT_SECONDS = {"cpu": (2.0, 4.0), "cuda": (8.0, 16.0)}  # two lengths of a measured step: their difference is free of
# what does not grow with it


@dataclass(frozen=True)
class Plan:
    """What a run's YAML and corpus say, in seconds of audio."""

    steps: int
    batch_seconds: float  # of one batch over all processes; an upper limit, since ESPnet fills batches up to it
    accumulation: int
    crop_seconds: float  # of one utterance, at the corpus' mean
    corpus_hours: float  # nan when no corpus is given
    use_amp: bool  # products in bfloat16

    @property
    def audio_hours(self) -> float:
        """Hours of audio that the run reads."""
        return self.steps * self.batch_seconds * self.accumulation / 3600


@dataclass(frozen=True)
class Rate:
    """How fast training steps go on one device, and the memory of their activations."""

    macs_per_second: float
    activation_mb_per_second: float  # MiB per second of audio in the batch; nan when not measured
    source: str


def read_plan(pretrain_config: Path, corpus: Path | None) -> Plan:
    """Read a YAML of conf/pretrain, and ``utt2num_samples`` of a checked set.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the YAML lacks a key, or the set is empty.
    """
    values = yaml.safe_load(pretrain_config.read_text(encoding="utf-8"))
    missing = [key for key in ("max_steps", "batch_bins") if not isinstance(values, Mapping) or key not in values]
    if missing:
        raise ValueError(f"{pretrain_config}: no {' or '.join(missing)}; give a file of conf/pretrain")
    crop, hours = values.get("max_crop_samples", 250_000) / SAMPLE_RATE, math.nan
    if corpus is not None:
        path = corpus / "utt2num_samples"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a checked set, such as dump/raw/train")
        lengths = [int(line.split()[1]) / SAMPLE_RATE for line in path.read_text().splitlines()]
        if not lengths:
            raise ValueError(f"{path}: empty; make the set anew: ./run.sh --stage check")
        hours = sum(lengths) / 3600
        crop = sum(min(length, crop) for length in lengths) / len(lengths)
    seconds = values["batch_bins"] / SAMPLE_RATE
    return Plan(values["max_steps"], seconds, values.get("accum_grad", 1), crop, hours, values.get("use_amp", False))


def measured_rate(config: HubertConfig | SsambaConfig, device: str, use_amp: bool = False) -> Rate:
    """Time and weigh a training step (forward and backward pass) of one utterance of a few seconds, on this machine."""
    amp = torch.autocast(device, torch.bfloat16, enabled=use_amp)
    torch.manual_seed(0)
    model = (SsambaModel(config) if isinstance(config, SsambaConfig) else HubertModel(config)).to(device)
    short, long = SHORT_SECONDS[device]
    peaks = {}
    for seconds in (short, long):
        call = amp(make_call(model, "train", 1, seconds, device))
        call()  # loads and checks kernels
        _, peaks[seconds] = peak_memory_mb(call, device)
    wall = min(wall_time(call, device) for _ in range(2))
    macs = STEP_PASSES * sum(count_macs_of(config, round(long * SAMPLE_RATE)).values())
    where = torch.cuda.get_device_name() if device == "cuda" else f"this CPU, {torch.get_num_threads()} threads"
    slope = max(0.0, (peaks[long] - peaks[short]) / (long - short))
    return Rate(
        macs / wall,
        slope,
        f"a step of {long:g} s of audio measured on {where}: {wall:.3g} s, {'bfloat16' if use_amp else 'float32'}",
    )


def assumed_rate(peak_tflops: float, mfu: float, activation_mb_per_second: float) -> Rate:
    """Return the rate of a GPU of ``peak_tflops`` of which training uses the share ``mfu``."""
    source = f"assumed: {mfu:.0%} of a GPU's {peak_tflops:g} TFLOP/s (--mfu, --peak_tflops)"
    return Rate(peak_tflops * 1e12 * mfu / FLOP_PER_MAC, activation_mb_per_second, source)


def forecast(config: HubertConfig | SsambaConfig, plan: Plan, rate: Rate, ngpu: int) -> list[tuple[str, str]]:
    """Return (what, estimate) lines for a run on ``ngpu`` GPUs (0: one CPU process)."""
    crop_macs = sum(count_macs_of(config, round(plan.crop_seconds * SAMPLE_RATE)).values())
    utterances = plan.audio_hours * 3600 / plan.crop_seconds
    devices = max(1, ngpu)
    hours = STEP_PASSES * crop_macs * utterances / rate.macs_per_second / devices / 3600
    per_device = plan.batch_seconds / devices
    parameters = _num_parameters(config)
    fixed = parameters * STATE_BYTES / 2**20
    activations = per_device * rate.activation_mb_per_second
    passes = "" if math.isnan(plan.corpus_hours) else f", {plan.audio_hours / plan.corpus_hours:.3g} times the corpus"
    corpus = "not given" if math.isnan(plan.corpus_hours) else f"{plan.corpus_hours:.3g} h"
    unit = "GPU-hours" if ngpu else "CPU-hours of one process"
    return [
        ("corpus", f"{corpus}; crops of {plan.crop_seconds:.3g} s on average"),
        (
            "run",
            f"{plan.steps} updates of {plan.batch_seconds * plan.accumulation:.4g} s: {plan.audio_hours:.4g} h{passes}",
        ),
        ("model", f"{parameters / 1e6:.2f} M parameters, {crop_macs / plan.crop_seconds / 1e9:.3g} GMAC per second"),
        ("rate", rate.source),
        (
            "time, an estimate",
            f"{hours:.3g} h on {devices} {'GPU' if ngpu else 'CPU process'}: {hours * devices:.3g} {unit}",
        ),
        (
            "memory per device, an estimate",
            f"{(fixed + activations) / 1024:.3g} GiB: {fixed / 1024:.3g} for weights, gradients and AdamW, "
            f"{activations / 1024:.3g} for {per_device:.4g} s of audio",
        ),
    ]


def _num_parameters(config: HubertConfig | SsambaConfig) -> int:
    with torch.device("meta"):
        model: Any = SsambaModel(config) if isinstance(config, SsambaConfig) else HubertModel(config)
    return sum(parameter.numel() for parameter in model.parameters())
