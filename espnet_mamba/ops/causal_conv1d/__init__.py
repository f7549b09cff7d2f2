"""Depthwise causal convolution over time with SiLU, aware of padding, direction and state."""

from espnet_mamba.ops.causal_conv1d.backends import BACKENDS
from espnet_mamba.ops.causal_conv1d.interface import causal_conv1d

__all__ = ["BACKENDS", "causal_conv1d"]
