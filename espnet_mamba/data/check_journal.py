"""What an interrupted check has found out already, so that the same command goes on from there."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from espnet_mamba.data.errors import AudioError

SECONDS = 30.0  # between additions: what takes less is not worth a file
Stamp = list[int]  # bytes and modification time in ns: whether a file is still the one that was judged


class AudioFacts(NamedTuple):
    """What a check learns of good audio; ``digest`` is BLAKE2b of 128 bits of the bytes (``b2sum -l 128``)."""

    samples: int
    bytes: int
    digest: str


class CheckJournal:
    """Verdicts by location. A verdict holds while the file has the size and time that it had."""

    def __init__(self, path: Path | None, min_samples: int) -> None:
        """Open ``path``, which may not be there; None keeps nothing. Verdicts under another limit are forgotten."""
        self.path, self._head = path, {"version": 1, "min_samples": min_samples}
        self._known: dict[str, dict[str, Any]] = {}
        self._new: list[str] = []
        self._written = time.monotonic()
        if path and path.is_file():
            self._known = self._read(path)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # cut by what ended the check
        if not rows or rows[0] != self._head:
            path.unlink()
            return {}
        return {row["location"]: row for row in rows[1:] if "location" in row}

    def find(self, location: str, stamp: Stamp) -> AudioFacts | AudioError | None:
        """Return the verdict on a location; None where there is none or the file changed."""
        row = self._known.get(location)
        if row is None or row["stamp"] != stamp:
            return None
        return AudioError(*row["fault"]) if "fault" in row else AudioFacts(*row["facts"])

    def add(self, location: str, stamp: Stamp, verdict: AudioFacts | AudioError) -> None:
        """Remember a verdict; it is on the disk within ``SECONDS``."""
        if self.path is None:
            return
        row: dict[str, Any] = {"location": location, "stamp": stamp}
        if isinstance(verdict, AudioError):
            row["fault"] = verdict.__reduce__()[1]
        else:
            row["facts"] = list(verdict)
        self._new.append(json.dumps(row, ensure_ascii=False) + "\n")
        if time.monotonic() - self._written >= SECONDS:
            self.write()

    def write(self) -> None:
        """Append what is new to the file."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.is_file()
        with self.path.open("a", encoding="utf-8") as handle:
            # the newline ends a line that a kill may have cut
            handle.write((json.dumps(self._head) if is_new else "") + "\n" + "".join(self._new))
        self._new, self._written = [], time.monotonic()

    def remove(self) -> None:
        """Delete the file: what it says stands in the manifest now."""
        if self.path and self.path.is_file():
            self.path.unlink()
            if not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()
