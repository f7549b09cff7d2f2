"""Stage 2: the raw tables are checked against each other and the audio; all faults are named, then one policy holds.

``refuse`` writes nothing when anything is wrong; ``skip`` leaves the faulty utterances out and lists them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from espnet_mamba.data.audio import SAMPLE_RATE, AudioError
from espnet_mamba.data.audio_check import FRAME_SAMPLES, MIN_SAMPLES, check_many
from espnet_mamba.data.bad_items import BadItem, compare_ids, compare_times, count_slots, format_bad_items
from espnet_mamba.data.check_journal import AudioFacts, CheckJournal
from espnet_mamba.data.folders import replaced_folders
from espnet_mamba.data.manifest import write_facts
from espnet_mamba.data.tables import SetTables, read_set, write_set

POLICIES = ("refuse", "skip")


@dataclass(frozen=True)
class CheckedSet:
    """One set after the check; ``facts`` is utterance -> what the manifest says of the good ones."""

    tables: SetTables
    facts: dict[str, AudioFacts]
    bad: list[BadItem]

    @property
    def num_samples(self) -> dict[str, int]:
        """Samples of each good utterance."""
        return {utt_id: facts.samples for utt_id, facts in self.facts.items()}


def check_sets(
    data_dir: str | Path,
    dump_dir: str | Path,
    sets: Sequence[str],
    policy: str = "refuse",
    nj: int = 1,
    min_samples: int = MIN_SAMPLES,
) -> None:
    """Check ``data_dir/<set>`` for each set and write ``dump_dir/<set>``; report on stdout, faults on stderr.

    ValueError when a table is broken, when ``policy`` is ``refuse`` and anything is bad, or when a set ends empty;
    ``dump_dir`` is then as it was.
    """
    if policy not in POLICIES:
        raise ValueError(f"bad_audio {policy!r}: must be one of {', '.join(POLICIES)}")
    if min_samples < FRAME_SAMPLES:
        raise ValueError(f"min_samples {min_samples}: must be {FRAME_SAMPLES} or more, the samples of one frame")
    data_dir = Path(data_dir)
    read = [read_set(data_dir / name, [data_dir / name, data_dir, Path.cwd()]) for name in sets]
    _refuse_broken_tables(read)
    for tables in read:
        for name in tables.unsorted:
            print(f"note: {data_dir}/{tables.name}/{name} is not sorted by utterance; sorted in {dump_dir}")
    checked_at = time.time()
    journals = {name: CheckJournal(_journal_path(Path(dump_dir), name), min_samples) for name in sets}
    checked = [_check_set(tables, data_dir / tables.name, nj, min_samples, journals[tables.name]) for tables in read]
    bad = [item for one in checked for item in one.bad]
    if bad:
        print(format_bad_items(bad), file=sys.stderr)
        if policy == "refuse":
            raise ValueError(
                f"{len(bad)} bad items in {data_dir}, listed above; nothing was written; "
                f"correct them, or leave them out with --bad_audio skip"
            )
    checked = [_without_bad(one) for one in checked]
    for one in checked:
        if not one.facts:
            raise ValueError(f"{data_dir}/{one.tables.name}: no usable utterance is left; the set must not be empty")
    with replaced_folders(dump_dir, sets) as folders:
        for one in checked:
            write_set(one.tables, folders[one.tables.name], one.num_samples)
            write_facts(folders[one.tables.name], one.facts, checked_at)
            if one.bad:
                _write_rejected(one.bad, folders[one.tables.name] / "rejected.tsv")
    for journal in journals.values():
        journal.remove()
    _note_shared_speakers(checked)
    print("\n".join(summary_line(one) for one in checked))


def _refuse_broken_tables(read: Sequence[SetTables]) -> None:
    """Raise ValueError when any table cannot be trusted: which of two lines is meant is not ours to guess."""
    problems = [problem for tables in read for problem in tables.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{len(problems)} problems in the tables, listed above; correct them; nothing was written")


def _journal_path(dump_dir: Path, name: str) -> Path:
    """Return where a check that takes long notes what it has found: beside the folder, which is written at its end."""
    return dump_dir.parent / f".checking.{dump_dir.name}" / f"{name}.jsonl"


def _check_set(tables: SetTables, folder: Path, nj: int, min_samples: int, journal: CheckJournal) -> CheckedSet:
    """Compare one set's tables with each other and with the audio."""
    bad = compare_ids(tables, folder)
    good: dict[str, AudioFacts] = {}
    for utt_id, result in check_many(tables.wavs, nj, min_samples, journal).items():
        if isinstance(result, AudioError):
            bad.append(
                BadItem(tables.name, utt_id, result.reason, result.path, result.value, result.limit, result.remedy)
            )
        else:
            good[utt_id] = result
    checked = CheckedSet(tables, good, bad)
    bad += compare_times(tables, folder, checked.num_samples)
    bad += count_slots(tables, folder)
    bad.sort(key=lambda item: (item.utt_id, item.place))
    return checked


def _without_bad(one: CheckedSet) -> CheckedSet:
    """Return the set without its bad utterances, the same ids in every table."""
    bad_ids = {item.utt_id for item in one.bad}
    good = [utt_id for utt_id in one.facts if utt_id not in bad_ids]
    tables = replace(
        one.tables,
        wavs={utt_id: one.tables.wavs[utt_id] for utt_id in good},
        texts={utt_id: one.tables.texts[utt_id] for utt_id in good},
        speakers={utt_id: one.tables.speakers[utt_id] for utt_id in good},
        alignments={name: {utt_id: table[utt_id] for utt_id in good} for name, table in one.tables.alignments.items()},
        intents=None if one.tables.intents is None else {utt_id: one.tables.intents[utt_id] for utt_id in good},
        labels={name: {utt_id: table[utt_id] for utt_id in good} for name, table in one.tables.labels.items()},
    )
    return CheckedSet(tables, {utt_id: one.facts[utt_id] for utt_id in good}, one.bad)


def _write_rejected(bad: Sequence[BadItem], path: Path) -> None:
    lines = ["utterance\treason\tfile\tvalue\tlimit\tremedy"]
    lines += ["\t".join((b.utt_id, b.reason, b.place, b.value, b.limit, b.remedy)) for b in bad]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _note_shared_speakers(checked: Sequence[CheckedSet]) -> None:
    """Say which sets share speakers: allowed, but a test set of known speakers measures something else."""
    for index, one in enumerate(checked):
        for other in checked[index + 1 :]:
            shared = set(one.tables.speakers.values()) & set(other.tables.speakers.values())
            if shared:
                print(f"note: {one.tables.name} and {other.tables.name} share {len(shared)} speakers")


def summary_line(one: CheckedSet) -> str:
    """Return utterances, hours, speakers, durations and rejected items of one set in one line."""
    seconds = sorted(count / SAMPLE_RATE for count in one.num_samples.values())
    middle = len(seconds) // 2
    median = seconds[middle] if len(seconds) % 2 else (seconds[middle - 1] + seconds[middle]) / 2
    return (
        f"{one.tables.name}: {len(seconds)} utterances, {sum(seconds) / 3600:.3f} h ({sum(seconds) / 60:.1f} min), "
        f"{len(set(one.tables.speakers.values()))} speakers, "
        f"seconds min {seconds[0]:.2f} median {median:.2f} max {seconds[-1]:.2f}, "
        f"{len({item.utt_id for item in one.bad})} left out"
    )
