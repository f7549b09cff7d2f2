"""Phone and word times of LibriSpeech from a forced aligner: one TextGrid an utterance, or CTM files."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from espnet_mamba.data.alignment import SILENCE
from espnet_mamba.data.kaldi import Segment, read_ctm
from espnet_mamba.data.tables import ALIGNMENTS, SetTables
from espnet_mamba.data.textgrid import read_textgrid

PAUSES = ("", "sp", "sil", "SIL", "<eps>")  # a pause in a words or phones tier
UNKNOWN_WORD = "<unk>"  # a word that the aligner's dictionary lacks
Times = dict[str, list[Segment]]  # file name of ALIGNMENTS -> segments of one utterance


def add_alignments(sets: list[SetTables], folder: Path, unaligned: str, nj: int = 1) -> None:
    """Give each set the phones.ctm and words.ctm that ``folder`` has; see ``librispeech.prepare`` for ``unaligned``.

    ``folder`` is searched at any depth for ``<utterance id>.TextGrid`` with tiers "phones" and "words", else for files
    phones.ctm and words.ctm.

    Raises:
        FileNotFoundError: nothing of that kind in the folder.
        ValueError: a malformed file.
    """
    times_of = _open_folder(folder)
    for tables in sets:
        _align_set(tables, folder, times_of, unaligned, nj)


def _align_set(tables: SetTables, folder: Path, times_of: Callable[[str], Times], unaligned: str, nj: int) -> None:
    ids = sorted(tables.wavs)
    with ThreadPoolExecutor(max(1, nj)) as pool:
        results = pool.map(lambda utt_id: _with_texts(times_of(utt_id), tables.texts.get(utt_id, "")), ids)
        progress = tqdm(results, total=len(ids), desc=f"alignments of {tables.name}", unit="utt", mininterval=5)
        times = dict(zip(ids, progress, strict=True))
    for name in ALIGNMENTS:
        aligned = {utt_id: rows[name] for utt_id, rows in times.items() if rows.get(name)}
        missing = [utt_id for utt_id in tables.wavs if utt_id not in aligned]
        if missing and aligned:
            what = "are left out" if unaligned == "drop" else f"are kept, and {tables.name} goes without {name}"
            print(
                f"{tables.name}: {len(missing)} of {len(ids)} utterances have no {name} in {folder} or another "
                f"text in it ({' '.join(missing[:3])} ...); they {what} (--unaligned keep or drop)"
            )
        if not aligned or missing and unaligned == "keep":
            continue
        tables.alignments[name] = aligned
        _drop(tables, set(missing))


def _drop(tables: SetTables, utt_ids: set[str]) -> None:
    for table in (tables.wavs, tables.texts, tables.speakers, *tables.alignments.values()):
        for utt_id in utt_ids:
            table.pop(utt_id, None)


def _with_texts(times: Times, text: str) -> Times:
    """Keep the words if they are those of ``text``, in its spelling; aligners write small letters and <unk>."""
    words, wanted = times.get("words.ctm", []), text.split()
    same = len(words) == len(wanted) and all(
        segment.label.upper() == word.upper() or segment.label == UNKNOWN_WORD
        for segment, word in zip(words, wanted, strict=True)
    )
    rows = [segment._replace(label=word) for segment, word in zip(words, wanted, strict=True)] if same else []
    return times | {"words.ctm": rows}


def _open_folder(folder: Path) -> Callable[[str], Times]:
    """Return a function from utterance id to what ``folder`` knows of it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"alignments_dir {folder}: no such folder")
    grids: dict[str, str] = {}
    ctms: dict[str, dict[str, list[Segment]]] = {name: {} for name in ALIGNMENTS}
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".TextGrid"):
                grids[name[: -len(".TextGrid")]] = os.path.join(place, name)
            elif name in ALIGNMENTS:
                ctms[name] |= read_ctm(os.path.join(place, name))
    if grids:
        return lambda utt_id: _from_grid(grids[utt_id]) if utt_id in grids else {}
    if any(ctms.values()):
        return lambda utt_id: {name: rows[utt_id] for name, rows in ctms.items() if utt_id in rows}
    raise FileNotFoundError(f"alignments_dir {folder}: neither *.TextGrid nor {' or '.join(ALIGNMENTS)} below it")


def _from_grid(path: str) -> Times:
    """Read one TextGrid: phones without stress, pauses as ``sil``; words without pauses."""
    tiers = read_textgrid(path)
    phones = [
        # AH0, AH1 and AH2 are one phone here, as in the other corpora: 39, with sil and spn (unknown speech)
        segment._replace(label=SILENCE if segment.label in PAUSES else segment.label.rstrip("012"))
        for segment in tiers.get("phones", [])
    ]
    words = [segment for segment in tiers.get("words", []) if segment.label not in PAUSES]
    return {"phones.ctm": phones, "words.ctm": words}
