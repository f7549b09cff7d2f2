"""What this machine offers: versions, devices, and which kernels will serve the scan and the convolution."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import sys

import torch

from espnet_mamba.ops import compiled
from espnet_mamba.ops.causal_conv1d import backends as conv_backends
from espnet_mamba.ops.selection import FORCE, tolerance
from espnet_mamba.ops.selective_scan import backends as scan_backends

PACKAGES = ("torch", "torchaudio", "triton", "espnet", "s3prl", "mamba-ssm", "causal-conv1d", "numpy")


def describe() -> list[tuple[str, str]]:
    """Return (what, finding) lines; compiles the CPU kernels if need be and runs every backend's check."""
    logging.getLogger("espnet_mamba.ops").setLevel(logging.ERROR)  # each reason stands in the table already
    lines = [("python", sys.version.split()[0]), ("processor", f"{platform.machine()}, {os.cpu_count()} cores")]
    lines += [(name, _version(name)) for name in PACKAGES]
    lines += [("torch threads", str(torch.get_num_threads())), ("gpu", _gpu())]
    lines += [("cpu kernels", _compiled()), (FORCE, os.environ.get(FORCE, "not set"))]
    for operation, module in (("selective_scan", scan_backends), ("causal_conv1d", conv_backends)):
        for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
            dtypes = [torch.float32] if device.type == "cpu" else [torch.float32, torch.bfloat16]
            for dtype in dtypes:
                lines.append((f"{operation} on {device.type}, {str(dtype)[6:]}", _choice(module, device, dtype)))
    return lines


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
