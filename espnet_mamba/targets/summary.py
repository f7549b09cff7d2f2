"""The lines that a targets stage prints."""

from __future__ import annotations

from typing import Any

SHOWN = 20  # of the recordings that were left out; quality.json names all


def format_quality(result: dict[str, Any]) -> str:
    """Return a table of what ``quality.json`` holds: a row per set with and without silence, and what is left out."""
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
    for name, bad in result.get("left_out", {}).items():
        lines.append(f"{name}: {len(bad)} utterances could not be used and have no labels:")
        lines += [f"  {utt_id}: {why}" for utt_id, why in list(bad.items())[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"  and {len(bad) - SHOWN} more, all in quality.json")
    return "\n".join(lines)
