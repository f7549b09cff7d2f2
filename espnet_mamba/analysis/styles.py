"""How a system's line looks: told apart by colour, marker and line, and the same in every figure of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

# Okabe and Ito's palette, told apart with any common colour vision, without its yellow, which a white page hides. The
# number of markers has no factor in common with that of colours, so 56 systems differ in at least one of the two.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Long dashes only: short ones are the null's, dots the ceiling's.
DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (9, 1.5)), (0, (9, 1.5, 2, 1.5)))
GREY = "0.35"


@dataclass(frozen=True)
class Style:
    """Colour, marker and dashes of a line."""

    colour: str
    marker: str
    hollow: bool = False  # a random-weight twin: its sibling's colour and marker, unfilled and thin
    dashes: str | tuple[int, tuple[float, ...]] = "-"

    def line(self, with_marker: bool = True) -> dict[str, object]:
        """Return the options of matplotlib's ``plot``; a level line over all layers has no marker."""
        return {
            "color": self.colour,
            "marker": self.marker if with_marker else None,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markersize": 4.5,
            "linestyle": self.dashes,
            "linewidth": 1.0 if self.hollow else 1.6,
        }


_FIXED = {  # the three systems of every recipe
    "pretrained": Style("#0072B2", "o"),
    "random": Style("#D55E00", "s"),
    "fbank": Style("#009E73", "^"),
}


def styles_of(systems: Sequence[str]) -> dict[str, Style]:
    """Return a style per system; give all systems of the run, so that a figure of some of them looks the same.

    ``X random`` (or X_random, X-random) is drawn as X, hollow, when X is there too; so is ``run: random`` beside
    ``run: pretrained``.
    """
    siblings = {name: _sibling(name, systems) for name in systems if name not in _FIXED}
    others = [name for name, sibling in siblings.items() if sibling is None]
    taken = {_FIXED[name].colour for name in systems if name in _FIXED}
    free = [colour for colour in COLOURS if colour not in taken]
    # 7 colours have no factor in common with 8 markers, and 4, 5 or 6 have none with 7
    markers = MARKERS if len(free) == len(COLOURS) else MARKERS[:7]
    styles: dict[str, Style] = {name: style for name, style in _FIXED.items() if name in systems}
    for index, name in enumerate(others):
        dashes = DASHES[index // len(free) % len(DASHES)]
        styles[name] = Style(free[index % len(free)], markers[index % len(markers)], dashes=dashes)
    for name, sibling in siblings.items():
        if sibling is not None:
            styles[name] = replace(styles[sibling], hollow=True)
    return {name: styles[name] for name in systems}


def complete_styles(styles: Mapping[str, Style] | None, systems: Sequence[str]) -> dict[str, Style]:
    """Return ``styles`` if they know all of ``systems``, else new ones."""
    known = dict(styles or {})
    return known if all(name in known for name in systems) else styles_of(list(dict.fromkeys([*known, *systems])))


def _sibling(name: str, systems: Sequence[str]) -> str | None:
    """Return the trained system that ``name`` is the random-weight twin of, if it is there."""
    for candidate in (re.sub(r"[ _-]?random$", "", name), re.sub(r"random$", "pretrained", name)):
        if candidate != name and candidate in systems:
            return candidate
    return None
