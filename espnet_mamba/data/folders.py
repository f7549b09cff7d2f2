"""Folders that are either whole or as they were: written beside their place and renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SYNTH_RECORD = "synth.json"
_TABLES_OF_CORPORA = ("wav.scp", "text", "utt2spk", "spk2utt", "phones.ctm", "words.ctm", "utt2intent", "utt2emotion")
TABLE_NAMES = (*_TABLES_OF_CORPORA, "spk2gender", "utt2num_samples")


@contextmanager
def replaced_folders(parent: str | Path, names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Yield an empty temporary folder per name; on success each takes the place of ``parent/name``.

    On any error nothing under ``parent`` has changed: the temporary folders are removed, and ``parent`` itself and
    the folders above it too where they were not there before.
    """
    parent = Path(parent)
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    staging = parent / f".writing.{os.getpid()}"
    _remove_abandoned(parent)
    try:
        folders = {name: staging / name for name in names}
        for folder in folders.values():
            folder.mkdir(parents=True)
        yield folders
        for name, folder in folders.items():
            _put_in_place(folder, parent / name, staging / f"{name}.old")
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def refuse_foreign_files(folder: Path) -> None:
    """Raise ValueError when ``folder``, about to be replaced, holds anything that this package does not write.

    A user's own recordings may lie in ``data/<set>``; a corpus that was synthesised carries its record SYNTH_RECORD.
    """
    if not folder.is_dir() or (folder / SYNTH_RECORD).is_file():
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in TABLE_NAMES)
    if foreign:
        raise ValueError(
            f"{folder}: holds {foreign[0]!r}, which would be lost ({len(foreign)} such files or folders); "
            f"move it away or give another --data_dir"
        )


def _remove_abandoned(parent: Path) -> None:
    """Remove what a killed writer left behind: a whole corpus of audio, perhaps."""
    for folder in parent.glob(".writing.*"):
        if not _is_running(int(folder.suffix[1:])):
            shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(new: Path, place: Path, old: Path) -> None:
    """Rename ``new`` to ``place``; what stood there is moved to ``old`` first, since rename needs an empty place."""
    if place.is_dir():
        os.replace(place, old)
    os.replace(new, place)


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
