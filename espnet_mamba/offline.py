"""Keeps the imports of ESPnet and S3PRL off the network: both ask nltk for two data files while they are imported.

g2p_en, which ESPnet imports, calls ``nltk.download`` unless nltk finds a tagger and a dictionary. None of our commands
uses either, so two empty archives in a folder of our own satisfy the look-up.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path

ARCHIVES = ("taggers/averaged_perceptron_tagger_eng.zip", "corpora/cmudict.zip")


def prepare() -> Path:
    """Point ``NLTK_DATA`` at a folder that holds what the imports look for, and return that folder.

    A folder of the user's that already holds the files (as archives or unpacked) is kept; else ours comes first and
    the user's after it. Must run before ESPnet or S3PRL is imported; calling it again costs nothing.
    """
    given = [part for part in os.environ.get("NLTK_DATA", "").split(os.pathsep) if part]
    for part in given:
        if all(_present(Path(part), name) for name in ARCHIVES):
            return Path(part)
    folder = _our_folder()
    os.environ["NLTK_DATA"] = os.pathsep.join([str(folder), *given])
    return folder


def _present(folder: Path, name: str) -> bool:
    return (folder / name).is_file() or (folder / name).with_suffix("").is_dir()


def _our_folder() -> Path:
    """Return the first place that can be written: the user's cache, else a temporary folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espnet_mamba" / "nltk_data"
    try:
        return _fill(cache)
    except OSError:
        return _fill(Path(tempfile.mkdtemp(prefix="espnet_mamba_nltk_")))


def _fill(folder: Path) -> Path:
    for name in ARCHIVES:
        path = folder / name
        if path.is_file():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        zipfile.ZipFile(temporary, "w").close()
        os.replace(temporary, path)
    return folder
