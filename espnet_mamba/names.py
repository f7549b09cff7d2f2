"""For error messages: the known name that a mistyped one probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the most similar of ``known``, or None when none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None
