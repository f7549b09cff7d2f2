"""Mamba's selective scan with lengths, direction and state."""

from espnet_mamba.ops.selective_scan.interface import BACKENDS, padding_mask, selective_scan

__all__ = ["BACKENDS", "padding_mask", "selective_scan"]
