"""The checked list of utterances that stage 2 writes and every later stage reads. S: samples at 16 kHz.

``manifest.tsv`` holds samples, bytes and digest of each recording. Whether audio changed since is seen by a look at the
size and time of 1000 recordings: it costs the same for a thousand utterances and a million.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from espnet_mamba.data.audio import read_bytes
from espnet_mamba.data.audio_check import digest_of
from espnet_mamba.data.check_journal import AudioFacts
from espnet_mamba.data.errors import AudioError
from espnet_mamba.data.files import write_text
from espnet_mamba.data.kaldi import read_table
from espnet_mamba.data.tar_shards import parse_member

MANIFEST = "manifest.tsv"
HEAD = "utterance\tsamples\tbytes\tblake2b"
MAX_LOOKED_AT, MAX_READ = 1000, 16  # recordings whose size and time are looked at; whose bytes are read as well


@dataclass(frozen=True)
class Utterance:
    """One checked recording: 16 kHz mono, ``num_samples`` long; ``text`` is empty when the set has none."""

    utt_id: str
    path: str
    num_samples: int
    speaker: str
    text: str


def read_manifest(folder: str | Path) -> list[Utterance]:
    """Read a ``dump/raw/<set>`` folder into utterances sorted by id.

    FileNotFoundError names the stage that makes the folder; ValueError names ids that are not in all tables, or a
    recording that changed since the check.
    """
    folder = Path(folder)
    if not (folder / "utt2num_samples").is_file():
        raise FileNotFoundError(f"{folder}/utt2num_samples: not there; it is made by stage 2 (check)")
    paths = read_table(folder / "wav.scp")
    lengths = read_table(folder / "utt2num_samples")
    speakers = read_table(folder / "utt2spk")
    texts = read_table(folder / "text", allow_empty=True) if (folder / "text").is_file() else dict.fromkeys(paths, "")
    for name, table in (("utt2num_samples", lengths), ("utt2spk", speakers), ("text", texts)):
        odd = sorted(set(paths) ^ set(table))
        if odd:
            raise ValueError(
                f"{folder}/{name}: {len(odd)} ids differ from wav.scp, the first is {odd[0]!r}; rerun stage 2 (check)"
            )
    changed = changed_audio(folder, paths)
    if changed:
        raise ValueError(changed)
    return [
        Utterance(utt_id, path, _whole_number(folder, utt_id, lengths[utt_id]), speakers[utt_id], texts[utt_id])
        for utt_id, path in sorted(paths.items())
    ]


def _whole_number(folder: Path, utt_id: str, value: str) -> int:
    """Return ``value`` as a positive whole number or name the utterance."""
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{folder}/utt2num_samples: {utt_id}: {value!r} is not a count; rerun stage 2 (check)")
    return int(value)


def write_facts(folder: Path, facts: Mapping[str, AudioFacts], checked_at: float) -> None:
    """Write ``manifest.tsv`` of a set, with the time (s since 1970) at which the first recording was looked at."""
    rows = [f"{utt_id}\t{f.samples}\t{f.bytes}\t{f.digest}" for utt_id, f in sorted(facts.items())]
    write_text(folder / MANIFEST, "\n".join([HEAD, *rows]) + "\n")
    os.utime(folder / MANIFEST, (checked_at, checked_at))


def read_facts(folder: Path) -> dict[str, AudioFacts]:
    """Read ``manifest.tsv`` of a set.

    FileNotFoundError when an older stage 2 made the folder, ValueError for a file that is not whole.
    """
    return {utt_id: facts for utt_id, facts in map(_parse, _rows(folder / MANIFEST))}


def changed_audio(folder: Path, locations: Mapping[str, str], at_most: int = MAX_LOOKED_AT) -> str:
    """Say which recordings of a set changed since it was checked; empty when none did, or where no manifest is.

    Looks at ``at_most`` of them, evenly spread: the size, and for up to 16 of those that are newer than the manifest
    the bytes, since copying a corpus renews its times.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return ""
    checked_at = path.stat().st_mtime_ns
    rows = _rows(path)
    step = -(-len(rows) // at_most)
    looked_at = [_parse(row) for row in rows[::step]]
    changed, newer = [], []
    for utt_id, facts in looked_at:
        if utt_id not in locations:
            changed.append(f"{utt_id} is not in wav.scp")
            continue
        location = locations[utt_id]
        fault, is_newer = _look(location, facts, checked_at)
        if fault:
            changed.append(fault)
        elif is_newer:
            newer.append((location, facts))
    for location, facts in newer[:: -(-len(newer) // MAX_READ) or 1]:
        try:
            if digest_of(read_bytes(location)) != facts.digest:
                changed.append(f"{location} has other contents")
        except AudioError as error:
            changed.append(str(error))
    if not changed:
        return ""
    return (
        f"{path} is older than the audio: {len(changed)} of {len(looked_at)} recordings looked at changed since, the "
        f"first: {changed[0]}; rerun stage 2 (check), and what was made of the old ones"
    )


def _look(location: str, facts: AudioFacts, checked_at: int) -> tuple[str, bool]:
    """Return what is wrong with a recording's file by its size, and whether it is newer than the manifest."""
    member = parse_member(location)
    try:
        stat = os.stat(member.shard if member else location)
    except OSError as error:
        return f"{location}: {error.strerror}", False
    size = stat.st_size
    if member:
        size = member.length if size >= member.offset + member.length else size - member.offset
    if size != facts.bytes:
        return f"{location} has {size} bytes, had {facts.bytes}", False
    return "", stat.st_mtime_ns > checked_at


def _rows(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; it is made by stage 2 (check)")
    head, *rows = path.read_text(encoding="utf-8").split("\n")
    if head != HEAD or rows[-1:] != [""]:
        raise ValueError(f"{path}: not a whole manifest; rerun stage 2 (check)")
    return rows[:-1]


def _parse(row: str) -> tuple[str, AudioFacts]:
    utt_id, samples, size, digest = row.split("\t")
    return utt_id, AudioFacts(int(samples), int(size), digest)
