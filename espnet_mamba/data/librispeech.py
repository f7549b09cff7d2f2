"""LibriSpeech (Panayotov et al. 2015) and its mini form as the recipe's ``data/<set>``: fetched, or unpacked before.

The tree: ``LibriSpeech/SPEAKERS.TXT`` and ``LibriSpeech/<part>/<reader>/<chapter>/``, which holds the chapter's
``<reader>-<chapter>-<number>.flac`` and one ``<reader>-<chapter>.trans.txt`` of lines ``<utterance id> WORDS``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from espnet_mamba.data.download import fetch
from espnet_mamba.data.folders import refuse_foreign_files, replaced_folders
from espnet_mamba.data.kaldi import write_table
from espnet_mamba.data.librispeech_alignments import add_alignments
from espnet_mamba.data.tables import SetTables, write_set
from espnet_mamba.data.unpack import is_unpacked, unpack
from espnet_mamba.names import nearest

MIRROR = "https://www.openslr.org/resources"
# part -> its number on OpenSLR, and the md5 of its .tar.gz in OpenSLR's own md5sum.txt
ARCHIVES = {
    "dev-clean": (12, "42e2234ba48799c1f50f24a7926300a1"),
    "dev-other": (12, "c8d0bcc9cca99d4f8b62fcc847357931"),
    "test-clean": (12, "32fa31d27d2e1cad72775fee3f4849a9"),
    "test-other": (12, "fb5a50374b501bb3bac4815ee91d3135"),
    "train-clean-100": (12, "2a93770f6d5c6c964bc36631d331a522"),
    "train-clean-360": (12, "c0e676e450a7ff2f54aeade5171606fa"),
    "train-other-500": (12, "d1a0fd59409feb2c614ce4d30c387708"),
    "dev-clean-2": (31, "6d7ab67ac6a1d2c993d050e16d61080d"),
    "train-clean-5": (31, "5df7d4e78065366204ca6845bb08f490"),
}
SPEAKERS = ("reader", "chapter")


class Row(NamedTuple):
    """One utterance of a part: where its audio is, or should be; ``text`` is "" where there is none."""

    utt_id: str
    path: str
    text: str


def fetch_parts(parts: Sequence[str], download_dir: Path, mirror: str = MIRROR, keep_archives: bool = True) -> Path:
    """Fetch and unpack ``parts`` that are not there yet; return the folder that holds them.

    Raises:
        ValueError: a part that OpenSLR does not have; a wrong checksum.
        OSError: network or disk, one line with the remedy.
    """
    for part in parts:
        if part not in ARCHIVES:
            guess = nearest(part, ARCHIVES)
            hint = f"; did you mean {guess!r}?" if guess else f"; there are {', '.join(ARCHIVES)}"
            raise ValueError(f"part {part!r}: not in LibriSpeech on OpenSLR{hint}")
    for part in parts:
        number, md5 = ARCHIVES[part]
        archive = download_dir / f"{part}.tar.gz"
        if not is_unpacked(archive, download_dir):
            fetch(f"{mirror.rstrip('/')}/{number}/{part}.tar.gz", archive, md5, copies=2)
            unpack(archive, download_dir)
        if not keep_archives:
            archive.unlink(missing_ok=True)
    return find_root(download_dir, parts)


def find_root(corpus_dir: str | Path, parts: Sequence[str]) -> Path:
    """Return the folder of the parts: ``corpus_dir`` or ``corpus_dir/LibriSpeech``.

    Raises:
        FileNotFoundError: a part is missing; says which are there.
    """
    corpus_dir = Path(corpus_dir)
    inner = corpus_dir / "LibriSpeech"
    root = inner if inner.is_dir() else corpus_dir
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing:
        there = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        raise FileNotFoundError(
            f"{root}: no part {', '.join(missing)}; it has {', '.join(there[:9]) or 'no folders'}; choose parts with "
            "--train_parts, --dev_parts, --test_parts, or give the folder that holds <part>/<reader>/<chapter> "
            "(Kaldi-style folders are imported by python -m espnet_mamba.bin.import_corpus)"
        )
    return root


def read_part(folder: Path, nj: int = 1) -> list[Row]:
    """Read every chapter of one part, ``nj`` at a time; rows sorted by utterance id.

    Audio and transcripts need not match here: stage 2 names every id that lacks one of them.

    Raises:
        ValueError: lists transcript lines whose id is not the chapter's or comes twice; or a part without audio.
    """
    chapters = [
        (reader.name, chapter.name, chapter.path)
        for reader in os.scandir(folder)
        if reader.is_dir()
        for chapter in os.scandir(reader.path)
        if chapter.is_dir()
    ]
    with ThreadPoolExecutor(max(1, nj)) as pool:  # waiting for a file server, mostly
        results = pool.map(lambda chapter: _read_chapter(*chapter), sorted(chapters))
        progress = tqdm(results, total=len(chapters), desc=f"reading {folder.name}", unit="chapter", mininterval=5)
        results = list(progress)
    problems = [problem for _, _, found in results for problem in found]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError("; ".join(problems[:5]) + more + "; unpack the archive again")
    if not any(num_audio for _, num_audio, _ in results):
        raise ValueError(f"{folder}: no <reader>/<chapter>/*.flac below it; unpack the archive again")
    return sorted(row for found, _, _ in results for row in found)


def _read_chapter(reader: str, chapter: str, folder: str) -> tuple[list[Row], int, list[str]]:
    """Return a chapter's rows, its number of audio files, and what is wrong with its transcript."""
    prefix = f"{reader}-{chapter}"
    audio = {entry.name[:-5]: entry.path for entry in os.scandir(folder) if entry.name.endswith(".flac")}
    texts: dict[str, str] = {}
    problems = []
    transcript = Path(folder, f"{prefix}.trans.txt")
    if transcript.is_file():
        for number, line in enumerate(transcript.read_text(encoding="utf-8").splitlines(), start=1):
            utt_id, _, text = line.strip().partition(" ")
            if not line.strip():
                continue
            if not utt_id.startswith(f"{prefix}-") or utt_id in texts:
                problems.append(f"{transcript}:{number}: id {utt_id!r} comes twice or does not begin with {prefix}-")
            texts[utt_id] = text.strip()
    # where only the transcript is there, the path names the file that should be: stage 2 says that it is missing
    paths = {utt_id: str(Path(folder, f"{utt_id}.flac")) for utt_id in texts} | audio
    rows = [Row(utt_id, os.path.abspath(path), texts.get(utt_id, "")) for utt_id, path in paths.items()]
    return rows, len(audio), problems


def read_sexes(root: Path) -> dict[str, str]:
    """Read SPEAKERS.TXT, lines ``reader | F | part | minutes | name``: reader -> "f" or "m"; empty without the file."""
    path = root / "SPEAKERS.TXT"
    if not path.is_file():
        return {}
    fields = [line.split("|") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {
        row[0].strip(): row[1].strip().lower()
        for row in fields
        if len(row) > 2 and not row[0].startswith(";") and row[1].strip() in ("F", "M")
    }


def speaker_of(utt_id: str, speaker: str) -> str:
    """Return the reader of ``reader-chapter-number``, or ``reader-chapter``."""
    return utt_id.rsplit("-", 1 if speaker == "chapter" else 2)[0]


def read_tables(name: str, folders: Sequence[Path], speaker: str, nj: int) -> SetTables:
    """Read one set's parts into tables; an id without text has none in ``texts``."""
    rows = [row for folder in folders for row in read_part(folder, nj)]
    return SetTables(
        name,
        wavs={row.utt_id: row.path for row in rows},
        texts={row.utt_id: row.text for row in rows if row.text},
        speakers={row.utt_id: speaker_of(row.utt_id, speaker) for row in rows},
    )


def prepare(
    root: Path,
    data_dir: str | Path,
    parts: Mapping[str, Sequence[str]],
    speaker: str = "reader",
    alignments_dir: str | Path | None = None,
    unaligned: str = "keep",
    nj: int = 1,
) -> None:
    """Write ``data_dir/<set>/{wav.scp,text,utt2spk[,spk2gender,phones.ctm,words.ctm]}`` for each set of ``parts``.

    Args:
        root: folder of the parts, as ``find_root`` returns it.
        data_dir: its sets are replaced, all or none.
        parts: set -> its parts.
        speaker: what utt2spk names: "reader", who is one person; or "chapter", Kaldi's reader-chapter, which follows
            the recording conditions but makes several of one person.
        alignments_dir: TextGrids or CTM files by utterance.
        unaligned: where alignments lack utterances of a set, "keep" those and leave the alignment out, or "drop" them.
        nj: chapters or alignments read at a time.

    Raises:
        ValueError: a part in two sets, malformed transcripts or alignments; nothing is then written.
    """
    chosen = [part for names in parts.values() for part in names]
    twice = sorted({part for part in chosen if chosen.count(part) > 1})
    if twice:
        raise ValueError(f"part {', '.join(twice)}: given twice; a recording belongs to one of {', '.join(parts)}")
    for name in parts:
        refuse_foreign_files(Path(data_dir) / name)
    sexes = read_sexes(root)
    sets = [read_tables(name, [root / part for part in names], speaker, nj) for name, names in parts.items()]
    if alignments_dir is not None:
        add_alignments(sets, Path(alignments_dir), unaligned, nj)
    with replaced_folders(data_dir, list(parts)) as folders:
        for tables in sets:
            write_set(tables, folders[tables.name])
            speakers = sorted(set(tables.speakers.values()))
            known = {one: sexes[one.split("-")[0]] for one in speakers if one.split("-")[0] in sexes}
            if known:
                write_table(folders[tables.name] / "spk2gender", known)
            unknown = f", {len(speakers) - len(known)} of unknown sex" if len(known) < len(speakers) else ""
            aligned = "".join(f", {file}" for file in tables.alignments)
            print(f"{tables.name}: {len(tables.wavs)} recordings, {len(speakers)} speakers{unknown}{aligned}")
