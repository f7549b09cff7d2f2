"""The lines that a targets stage prints."""

from __future__ import annotations

from typing import Any


def format_quality(result: dict[str, Any]) -> str:
    """Return a table of what ``quality.json`` holds: one row per set, with and without silence."""
    lines = [
        f"{result['source']} layer {result['layer']}: K={result['num_clusters']} "
        f"fitted on {result['fit_frames']} frames at {result['rate_hz']:g} Hz"
    ]
    if not result["sets"]:
        lines.append("no phones.ctm: purity and PNMI are left out")
    for name, kinds in result["sets"].items():
        for kind, score in kinds.items():
            lines.append(
                f"{name:>6} {kind.replace('_', ' '):<11} purity {score['purity']:.3f}  "
                f"cluster purity {score['cluster_purity']:.3f}  PNMI {score['pnmi']:.3f}  "
                f"clusters used {score['used_clusters']}/{result['num_clusters']}  frames {score['num_frames']}"
            )
    return "\n".join(lines)
