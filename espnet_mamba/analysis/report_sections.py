"""The sections of the report in their order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from espnet_mamba.analysis.report_blocks import Section
from espnet_mamba.analysis.report_inputs import Results
from espnet_mamba.analysis.report_layers import layers_section
from espnet_mamba.analysis.report_machine import (
    configuration_section,
    efficiency_section,
    stages_section,
    versions_section,
)
from espnet_mamba.analysis.report_scores import asr_section, summary_section, superb_section
from espnet_mamba.analysis.report_training import targets_section, training_section


def build_sections(results: Results, out_dir: Path) -> list[Section]:
    """Return all sections in order; figures that the report draws itself go to ``out_dir``."""
    builders: list[Callable[[Results, Path], Section]] = [
        summary_section, targets_section, training_section, asr_section, superb_section, layers_section,
        efficiency_section, configuration_section, versions_section, stages_section,
    ]  # fmt: skip
    return [builder(results, out_dir) for builder in builders]
