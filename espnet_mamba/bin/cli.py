"""What every command shares: a user's mistake is one line."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


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
