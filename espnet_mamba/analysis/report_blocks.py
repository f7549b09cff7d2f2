"""What a report is made of: sections of blocks that Markdown and HTML are both rendered from, so that they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Missing:
    """A part that was not there, and the stage that makes it."""

    what: str
    stage: str

    @property
    def text(self) -> str:
        """The sentence that names it."""
        return f"Missing: {self.what}. It is made by {self.stage}."


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header, right aligned but for the columns of ``left``.

    ``folded`` names a long one, which the page folds; RESULTS.md then links to ``source``, the file with its rows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    folded: str = ""
    source: Path | None = None


@dataclass(frozen=True)
class Figure:
    """An SVG file with its caption."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Figures two across; ``folded`` names those that few readers need, which the page folds."""

    figures: Sequence[Figure]
    folded: str = ""


@dataclass(frozen=True)
class Code:
    """A file or command shown as it is."""

    title: str
    text: str


Block = Heading | Text | Missing | Table | Figure | Gallery | Code


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


def percent(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Format a fraction as percent, with its interval in brackets: ``12.3 [10.1, 14.5]``; a dash when absent."""
    return _with_interval(value, low, high, 100.0, 1)


def number(value: float | None, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """Format a value with its interval in brackets; a dash when absent."""
    return _with_interval(value, low, high, 1.0, digits)


def duration(seconds: float) -> str:
    """Format seconds for a reader: ``8.1 s``, ``3 min 12 s``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _with_interval(value: float | None, low: float | None, high: float | None, scale: float, digits: int) -> str:
    if value is None or math.isnan(value):
        return "–"
    text = f"{scale * value:.{digits}f}"
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return text
    return f"{text} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"
