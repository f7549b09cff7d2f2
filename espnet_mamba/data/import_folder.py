"""Bring your own corpus: a Kaldi-style folder becomes the recipe's ``data/<set>`` with absolute paths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from espnet_mamba.data.folders import refuse_foreign_files, replaced_folders
from espnet_mamba.data.tables import read_set, write_set


def import_folder(corpus_dir: str | Path, data_dir: str | Path, sets: Sequence[str]) -> None:
    """Copy the tables of ``corpus_dir/<set>`` to ``data_dir/<set>``; audio stays where it is.

    A relative path in wav.scp is looked for under ``corpus_dir``, then under the set's folder. Whether the files are
    any good is stage 2's question. Raises ValueError after printing every problem of the tables on stderr, and
    FileNotFoundError when ``corpus_dir`` is not there; ``data_dir`` is then as it was.
    """
    corpus_dir = Path(corpus_dir)
    if not corpus_dir.is_dir():
        raise FileNotFoundError(f"corpus_dir {corpus_dir.absolute()}: no such folder; it must hold {', '.join(sets)}")
    for name in sets:
        refuse_foreign_files(Path(data_dir) / name)
    read = [read_set(corpus_dir / name, [corpus_dir, corpus_dir / name]) for name in sets]
    problems = [problem for tables in read for problem in tables.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{len(problems)} problems in the tables of {corpus_dir}, listed above; nothing was written")
    with replaced_folders(data_dir, sets) as folders:
        for tables in read:
            write_set(tables, folders[tables.name])
    for tables in read:
        optional = (*tables.alignments.items(), ("utt2intent", tables.intents), *tables.labels.items())
        extras = [name for name, table in optional if table]
        print(f"{tables.name}: {len(tables.wavs)} recordings, {len(set(tables.speakers.values()))} speakers", *extras)
