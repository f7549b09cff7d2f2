"""The formulas of ``models.macs`` under the name by which the costs room and its users know them."""

from espnet_mamba.models.macs import (
    FLOP_PER_MAC,
    MIXER_MACS,
    SAMPLE_RATE,
    SCAN_MACS,
    count_macs,
    count_macs_of,
    count_ssamba_macs,
    macs_per_second,
    shortest_samples,
)

__all__ = [
    "FLOP_PER_MAC",
    "MIXER_MACS",
    "SAMPLE_RATE",
    "SCAN_MACS",
    "count_macs",
    "count_macs_of",
    "count_ssamba_macs",
    "macs_per_second",
    "shortest_samples",
]
