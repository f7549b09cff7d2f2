"""How every figure is saved: SVG and PNG, without a display, the same bytes for the same numbers."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed or asked for
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from espnet_mamba.data.files import atomic_path


def save_figure(figure: Figure, stem: str | Path) -> list[Path]:
    """Write ``stem``.svg and ``stem``.png (150 dpi), the same bytes for the same numbers; close the figure."""
    paths = [Path(f"{stem}.svg"), Path(f"{stem}.png")]
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()  # constrained layout finds room for long titles only the second time
    with matplotlib.rc_context({"svg.hashsalt": "espnet-mamba"}):
        for path in paths:
            with atomic_path(path) as temporary:
                metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
                figure.savefig(temporary, dpi=150, metadata=metadata)
    plt.close(figure)
    return paths
