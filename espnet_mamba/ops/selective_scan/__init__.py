"""Mamba's selective scan with lengths, direction and state."""

from espnet_mamba.ops.selective_scan.backends import BACKENDS
from espnet_mamba.ops.selective_scan.interface import selective_scan, selective_scan_bidirectional
from espnet_mamba.ops.selective_scan.protocol import Direction

__all__ = ["BACKENDS", "Direction", "selective_scan", "selective_scan_bidirectional"]
