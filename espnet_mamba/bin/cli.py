"""What every command shares: one-line errors, and the nearest name to a mistyped one."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Iterable


def run_main(main: Callable[[], None]) -> None:
    """Run ``main``; what a user can mend (a bad value, a missing file, a full disk) is one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC
        remedy = "; free some space and run the same command again: what was finished is kept" if full else ""
        print(f"error: {error}{remedy}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as `` (did you mean 'extbimamba_tiny'?)``, empty when nothing is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
