"""What this machine offers: versions, devices, kernels of scan and convolution, disk; and what a run will take."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from espnet_mamba import offline
from espnet_mamba.efficiency.macs_table import open_config
from espnet_mamba.efficiency.timing import wall_time
from espnet_mamba.efficiency.training_forecast import assumed_rate, forecast, measured_rate, read_plan
from espnet_mamba.ops import compiled
from espnet_mamba.ops.causal_conv1d import backends as conv_backends
from espnet_mamba.ops.selection import FORCE, tolerance
from espnet_mamba.ops.selective_scan import backends as scan_backends
from espnet_mamba.ops.selective_scan import selective_scan

PACKAGES = ("torch", "torchaudio", "triton", "espnet", "s3prl", "mamba-ssm", "causal-conv1d", "numpy")
SCAN_FRAMES, SCAN_WIDTH, SCAN_STATES = 780, 1536, 16  # 15.6 s in a layer of a Base model


def describe() -> list[tuple[str, str]]:
    """Return (what, finding) lines; compiles the CPU kernels if need be and runs every backend's check."""
    logging.getLogger("espnet_mamba.ops").setLevel(logging.ERROR)  # each reason stands in the table already
    lines = [("python", sys.version.split()[0]), ("processor", f"{platform.machine()}, {os.cpu_count()} cores")]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("torch threads", str(torch.get_num_threads())), ("gpu", _gpu())]
    lines += [("cpu kernels", _compiled()), (FORCE, os.environ.get(FORCE, "not set"))]
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for operation, module in (("selective_scan", scan_backends), ("causal_conv1d", conv_backends)):
        for device in devices:
            dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
            for dtype in dtypes:
                lines.append((f"{operation} on {device.type}, {str(dtype)[6:]}", _choice(module, device, dtype)))
    lines += [(f"selective_scan speed on {device.type}", _scan_speed(device)) for device in devices]
    lines += [("slurm", shutil.which("sbatch") or "no sbatch; cmd_backend=local only"), ("disk", _disk(Path.cwd()))]
    return [*lines, ("NLTK_DATA", str(offline.prepare()))]


def predict(
    model: Path, pretrain: Path, corpus: Path | None, ngpu: int | None, peak_tflops: float, mfu: float
) -> list[tuple[str, str]]:
    """Return lines on what a pretraining run takes; on GPUs that are not here, by ``peak_tflops`` and ``mfu``.

    Raises:
        FileNotFoundError, ValueError: what a file lacks.
        ValueError: ``ngpu``, ``peak_tflops`` or ``mfu`` out of range.
    """
    ngpu = torch.cuda.device_count() if ngpu is None else ngpu
    if ngpu < 0 or peak_tflops <= 0 or not 0 < mfu <= 1:
        raise ValueError(
            f"--ngpu {ngpu} --peak_tflops {peak_tflops} --mfu {mfu}: --ngpu must be at least 0, --peak_tflops above 0, "
            "--mfu above 0 and at most 1"
        )
    config, plan = open_config(model), read_plan(pretrain, corpus)
    rate = measured_rate(config, "cuda" if ngpu and torch.cuda.is_available() else "cpu", plan.use_amp)
    if ngpu and not torch.cuda.is_available():
        rate = assumed_rate(peak_tflops, mfu, rate.activation_mb_per_second)
    return forecast(config, plan, rate, ngpu)


def _scan_speed(device: torch.device) -> str:
    """Time the scan of one layer of a Base model over 15.6 s of audio, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(SCAN_FRAMES, SCAN_WIDTH)] * 2 + [(SCAN_FRAMES, SCAN_STATES)] * 2
    x, dt, b, c = (torch.randn(1, *shape, generator=generator).to(device).requires_grad_() for shape in shapes)
    a = -torch.ones(SCAN_WIDTH, SCAN_STATES, device=device)

    def forward() -> torch.Tensor:
        return selective_scan(x, dt, a, b, c)

    forward().sum().backward()
    times = [min(wall_time(f, device.type) for _ in range(3)) for f in (forward, lambda: forward().sum().backward())]
    return f"{times[0] * 1e3:.3g} ms forward, {times[1] * 1e3:.3g} ms with backward, 1 x {SCAN_FRAMES} x {SCAN_WIDTH}"


def _disk(folder: Path) -> str:
    free, total = shutil.disk_usage(folder).free / 2**30, shutil.disk_usage(folder).total / 2**30
    return f"{free:.0f} of {total:.0f} GiB free in {folder}"


def _choice(module: object, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that ``auto`` means, with each candidate's check."""
    selector = module.SELECTOR
    found = []
    for name in [*selector.preferred.get(device.type, []), selector.fallback]:
        reason = selector.unavailable(name)
        if reason:
            found.append(f"{name}: {reason}")
            continue
        try:
            error = selector.error(name, device, dtype)
        except Exception as failure:  # reported, not raised: finding such things is what this command is for
            found.append(f"{name}: fails ({type(failure).__name__}: {failure})")
            continue
        found.append(f"{name}: off by {error:.0e} of the reference, limit {tolerance(dtype):.0e}")
    return f"{selector.choose('auto', device, dtype)}  ({'; '.join(found)})"


def _compiled() -> str:
    library = compiled.library()
    if library is None:
        return f"none: {compiled.unavailable_reason()}"
    return f"{compiled.runnable_variants()[0]}, {library._name}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    properties = torch.cuda.get_device_properties(0)
    return f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
