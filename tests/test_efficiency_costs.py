"""Peak memory of a known allocation."""

from __future__ import annotations

import pytest
import torch

from espnet_mamba.efficiency.memory import _peak_by_sampling, peak_memory_mb


def allocate():
    return torch.ones(32 * 2**20).sum()  # 128 MiB of float32


def test_peak_memory_of_a_known_allocation():
    _, extra = peak_memory_mb(allocate)
    assert extra == pytest.approx(128, rel=0.15)
    _, after = peak_memory_mb(lambda: torch.ones(2**18).sum())
    assert after < 32, "the earlier, larger call must not be seen again"


def test_peak_memory_without_the_kernels_mark():
    resting = _peak_by_sampling(lambda: None)
    assert (_peak_by_sampling(allocate) - resting) / 2**20 > 60
