"""LibriSpeech's tree with a few seconds of noise: <part>/<reader>/<chapter>/*.flac with *.trans.txt, SPEAKERS.TXT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

PARTS = {"train-clean-5": ("103", "1088"), "dev-clean-2": ("84",), "test-clean": ("61",)}  # part -> readers
WORDS = ("CHAPTER ONE", "SHE SAID SO", "AND THEN THE RAIN")


def make_tree(root: Path, parts: dict[str, tuple[str, ...]] = PARTS, seconds: float = 0.5) -> Path:
    """Write two chapters a reader, three recordings of noise a chapter; return ``root/LibriSpeech``."""
    rng = np.random.default_rng(0)
    tree = root / "LibriSpeech"
    for part, readers in parts.items():
        for reader in readers:
            for chapter in ("1240", "1241"):
                recordings = [(rng.normal(0, 0.1, int(16000 * seconds)), words) for words in WORDS]
                write_chapter(tree / part, reader, chapter, recordings)
    sexes = {"103": "F", "1088": "F", "84": "M"}  # 61 is left out
    lines = [
        "; a comment | F | x\n",
        *(f"{one:<5}| {sex} | some-part | 25.03 | A Reader\n" for one, sex in sexes.items()),
    ]
    (tree / "SPEAKERS.TXT").write_text("".join(lines))
    return tree


def write_chapter(part: Path, reader: str, chapter: str, recordings: list[tuple[np.ndarray, str]]) -> None:
    """Write one chapter: recordings are (samples at 16 kHz, words)."""
    folder = part / reader / chapter
    folder.mkdir(parents=True)
    lines = []
    for number, (samples, words) in enumerate(recordings):
        utt_id = f"{reader}-{chapter}-{number:04d}"
        soundfile.write(folder / f"{utt_id}.flac", samples, 16000)
        lines.append(f"{utt_id} {words}\n")
    (folder / f"{reader}-{chapter}.trans.txt").write_text("".join(lines))
