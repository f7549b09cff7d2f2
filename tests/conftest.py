"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: several commands fork, and a child of a process whose OpenMP threads have run must not use
# more than one. The commands themselves fork before they compute; a test process computes before it forks.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def so762() -> Path:
    folder = ROOT.parent / "shared" / "data" / "so762_mini"
    if not folder.is_dir():
        pytest.skip("recorded speech (../shared/data/so762_mini) is not on this machine")
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes, for one file of tests; the file says when none can be had."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
