"""What every command shares: a user's mistake is one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def imports_without(package: str) -> Iterator[None]:
    """Let imports within do without ``package``, as where it is not installed, unless it has been imported already.

    For what a library imports in case, and the command never uses.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment] -- Python's own way to say that there is none
    try:
        yield
    finally:
        del sys.modules[package]
