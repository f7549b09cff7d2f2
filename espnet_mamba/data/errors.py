"""Faults of audio, each with what a user needs to mend it."""

from __future__ import annotations

from pathlib import Path


class AudioError(ValueError):
    """Audio that cannot be used; the text names the file, the value, the limit and the remedy."""

    def __init__(self, path: str | Path, reason: str, value: str, limit: str, remedy: str) -> None:
        super().__init__(f"{path}: {value} ({limit}); {remedy}")
        self.path = str(path)
        self.reason = reason
        self.value = value
        self.limit = limit
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[AudioError], tuple[str, str, str, str, str]]:
        # Exceptions pickle by their message alone; this one must come back whole from a worker process.
        return type(self), (self.path, self.reason, self.value, self.limit, self.remedy)
