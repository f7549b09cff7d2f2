"""A raw set's tables, ``data/<set>/{wav.scp,text,utt2spk[,phones.ctm][,words.ctm][,utt2intent][,utt2emotion]}``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from espnet_mamba.data.kaldi import Segment, scan_ctm, scan_table, write_ctm, write_table
from espnet_mamba.data.tar_shards import parse_member

REQUIRED = ("wav.scp", "text", "utt2spk")
# What one line of each is about.
ALIGNMENTS = {"phones.ctm": "phone", "words.ctm": "word"}
# One label an utterance, by the name that is written; under the other names they are read too.
LABELS = {"utt2emotion": ("utt2emotion", "utt2emo")}
OPTIONAL = (*ALIGNMENTS, "utt2intent", *LABELS)


@dataclass
class SetTables:
    """One set as it was read. ``wavs`` has resolved paths; ``problems`` are whole-table faults, one line each.

    ``alignments`` holds those of ALIGNMENTS that are there, by file name, each utterance -> segments in time order;
    ``labels`` those of LABELS, each utterance -> label.
    """

    name: str
    wavs: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    speakers: dict[str, str] = field(default_factory=dict)
    alignments: dict[str, dict[str, list[Segment]]] = field(default_factory=dict)
    intents: dict[str, str] | None = None
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    unsorted: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_set(folder: str | Path, roots: Sequence[str | Path]) -> SetTables:
    """Read one set folder; a relative path in wav.scp is looked for under each of ``roots`` in turn.

    Nothing is raised: missing tables, malformed lines, duplicate ids and pipes are all in ``problems``.
    """
    folder = Path(folder)
    tables = SetTables(folder.name)
    if not folder.is_dir():
        tables.problems.append(f"{folder}: no such folder; every set needs one with {', '.join(REQUIRED)}")
        return tables
    loaded: dict[str, dict[str, str]] = {}
    for name in (*REQUIRED, "utt2intent", *LABELS):
        path = _found(folder, name)
        if not path.is_file():
            if name in REQUIRED:
                tables.problems.append(f"{path}: no such table; write one line 'utterance value' for each recording")
            continue
        try:
            loaded[name], problems = scan_table(path, allow_empty=name == "text")
        except ValueError as error:
            problems = [str(error)]
        tables.problems += problems
        if list(loaded.get(name, ())) != sorted(loaded.get(name, ())):
            tables.unsorted.append(path.name)
    for utt_id, value in loaded.get("wav.scp", {}).items():
        _resolve(tables, folder / "wav.scp", utt_id, value, roots)
    tables.texts = loaded.get("text", {})
    tables.speakers = loaded.get("utt2spk", {})
    tables.intents = loaded.get("utt2intent")
    tables.labels = {name: loaded[name] for name in LABELS if name in loaded}
    for name in ALIGNMENTS:
        _read_alignment(tables, folder / name)
    return tables


def _found(folder: Path, name: str) -> Path:
    """Return the file of a table: the first of its names that is there, the proper one if none is."""
    return next((folder / other for other in LABELS.get(name, ()) if (folder / other).is_file()), folder / name)


def _resolve(tables: SetTables, table: Path, utt_id: str, value: str, roots: Sequence[str | Path]) -> None:
    """Put the absolute path of one recording into ``tables.wavs``, or a line into ``problems`` when it is a pipe."""
    if value.endswith("|") or value.startswith("|"):
        tables.problems.append(
            f"{table}: {utt_id}: {value!r} is a pipe, wav.scp must hold a file; run the command once, name its output"
        )
        return
    if not value:
        return
    member = parse_member(value)
    candidates = [Path(root).resolve() / (member.shard if member else value) for root in roots]
    found = str(next((path for path in candidates if path.is_file()), candidates[0]))
    tables.wavs[utt_id] = str(member._replace(shard=found)) if member else found


def _read_alignment(tables: SetTables, path: Path) -> None:
    if not path.is_file():
        return
    try:
        tables.alignments[path.name], problems = scan_ctm(path)
    except ValueError as error:
        problems = [str(error)]
    tables.problems += problems


def write_set(tables: SetTables, folder: Path, with_samples: dict[str, int] | None = None) -> None:
    """Write the tables sorted by utterance into ``folder``; ``with_samples`` adds utt2num_samples."""
    ids = sorted(tables.wavs)
    write_table(folder / "wav.scp", {utt_id: tables.wavs[utt_id] for utt_id in ids})
    rows = [("text", tables.texts), ("utt2spk", tables.speakers), ("utt2intent", tables.intents)]
    for name, table in (*rows, *tables.labels.items()):
        if table is not None:
            write_table(folder / name, {utt_id: table[utt_id] for utt_id in sorted(table)})
    for name, segments in tables.alignments.items():
        write_ctm(folder / name, {utt_id: segments[utt_id] for utt_id in sorted(segments)})
    if with_samples is not None:
        write_table(folder / "utt2num_samples", {utt_id: str(with_samples[utt_id]) for utt_id in ids})
