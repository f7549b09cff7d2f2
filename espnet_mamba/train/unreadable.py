"""Recordings that cannot be read while training: the run goes on without them, and each is named once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from espnet_mamba.data.bad_items import BadItem

FILE_NAME = "unreadable.tsv"
HEAD = "set\tutterance\treason\tfile\tvalue\tlimit\tremedy\n"
FEWEST = 10  # so many are always let pass


class Unreadable:
    """The utterances of one set left out so far; kept in ``unreadable.tsv`` of the experiment's folder."""

    def __init__(self, folder: Path | None, num_utterances: int, max_share: float) -> None:
        """Let pass at most ``max_share`` of ``num_utterances``, counted in each process by itself."""
        self.path = folder / FILE_NAME if folder else None
        self.num_utterances, self.limit = num_utterances, max(FEWEST, int(max_share * num_utterances))
        self.seen: set[str] = set()  # in this process; the file holds those of all processes and of earlier starts

    def add(self, bad: Sequence[BadItem]) -> None:
        """Name the utterances that are new.

        Raises:
            ValueError: they are too many: rather a disk that is gone than some bad files.
        """
        for item in bad:
            if item.utt_id in self.seen:
                continue
            self.seen.add(item.utt_id)
            if len(self.seen) > self.limit:
                raise ValueError(
                    f"{item.place}: {item.value}; it is number {len(self.seen)} of {self.num_utterances} utterances of "
                    f"{item.set_name} that cannot be read (at most {self.limit}, --max_unreadable); "
                    f"look whether the disk is there, or run stage 2 (check) again; they are listed in {self.path}"
                )
            logging.warning(f"{item.utt_id} is left out: {item.place}: {item.value} ({item.limit}); {item.remedy}")
            self._write(item)

    def _write(self, item: BadItem) -> None:
        if self.path is None:
            return
        start = f"{item.set_name}\t{item.utt_id}\t"
        known = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        if f"\n{start}" in known:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        row = start + "\t".join((item.reason, item.place, item.value, item.limit, item.remedy)) + "\n"
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(row if known else HEAD + row)
