"""What every command shares: one-line errors, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable


def run_main(main: Callable[[], None]) -> None:
    """Run ``main``; a user's mistake (ValueError, missing file) is one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'extbimamba_tiny'?)``, empty when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
