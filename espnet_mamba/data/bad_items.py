"""What can be wrong between the tables of a set and its audio, one item per utterance and fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from espnet_mamba.data.audio import SAMPLE_RATE
from espnet_mamba.data.tables import ALIGNMENTS, OPTIONAL, SetTables

# Alignments are made in 10 ms steps, so a last phone or word may pass the end of the audio by up to one of them.
CTM_TOLERANCE_SECONDS = 0.0101


@dataclass(frozen=True)
class BadItem:
    """One utterance that cannot be used as it is."""

    set_name: str
    utt_id: str
    reason: str
    place: str
    value: str
    limit: str
    remedy: str


def compare_ids(tables: SetTables, folder: Path) -> list[BadItem]:
    """Return an item for every id that wav.scp has and another table has not, or the other way round."""
    bad = []
    others: list[tuple[str, Mapping[str, object] | None]] = [("text", tables.texts), ("utt2spk", tables.speakers)]
    others += [("utt2intent", tables.intents), *tables.labels.items(), *tables.alignments.items()]
    for name, table in others:
        if table is None:
            continue
        place = str(folder / name)
        for utt_id in tables.wavs:
            # An id without words is as good as no transcript: nothing can be learnt from it.
            if not table.get(utt_id):
                remedy = "add a line or remove the recording"
                if name in OPTIONAL:
                    remedy += f", or do without {name}"
                bad.append(BadItem(tables.name, utt_id, f"no_{name}", place, "audio only", "in both tables", remedy))
        for utt_id in table:
            if utt_id not in tables.wavs:
                remedy = "add it to wav.scp or remove the line"
                bad.append(BadItem(tables.name, utt_id, "no_audio", place, f"{name} only", "in both tables", remedy))
    return bad


def compare_times(tables: SetTables, folder: Path, num_samples: dict[str, int]) -> list[BadItem]:
    """Return an item for every alignment, of phones or words, that overlaps itself or outlasts its audio."""
    bad = []
    rows = [(name, utt_id, rows) for name, table in tables.alignments.items() for utt_id, rows in table.items()]
    for name, utt_id, segments in rows:
        if utt_id not in num_samples:
            continue
        label = ALIGNMENTS[name]
        length = num_samples[utt_id] / SAMPLE_RATE
        end = max(segment.end for segment in segments)
        overlap = max((a.end - b.start for a, b in pairwise(segments)), default=0.0)
        if end > length + CTM_TOLERANCE_SECONDS:
            value, limit = f"a {label} ends at {end:.3f} s", f"{length:.3f} s of audio"
        elif overlap > CTM_TOLERANCE_SECONDS:
            value, limit = f"{label}s overlap by {overlap:.3f} s", "0.010 s"
        else:
            continue
        remedy = "align this recording again"
        bad.append(BadItem(tables.name, utt_id, f"{label}_times", str(folder / name), value, limit, remedy))
    return bad


def count_slots(tables: SetTables, folder: Path) -> list[BadItem]:
    """Return an item for every intent that has not one token per slot."""
    return [
        BadItem(
            *(tables.name, utt_id, "intent_slots", str(folder / "utt2intent"), f"{len(intent.split())} slots"),
            *("4: action object place number", "write 'none' where a slot is absent"),
        )
        for utt_id, intent in (tables.intents or {}).items()
        if utt_id in tables.wavs and len(intent.split()) != 4
    ]


def format_bad_items(bad: Sequence[BadItem]) -> str:
    """Return a table of all bad items, one a line, and below it how many there are of each reason."""
    rows = [("set", "utterance", "reason", "file", "value", "limit", "remedy")]
    rows += [(b.set_name, b.utt_id, b.reason, b.place, b.value, b.limit, b.remedy) for b in bad]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = Counter(item.reason for item in bad)
    lines.append("counts: " + ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())))
    return "\n".join(lines)
