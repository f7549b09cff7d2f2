"""Lists for the SUPERB problems, made from checked data folders."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from espnet_mamba.data.files import atomic_path
from espnet_mamba.data.kaldi import read_table
from espnet_mamba.data.manifest import Utterance, read_manifest
from s3prl_upstream.superb_keywords import WORDS, KeywordOptions, keyword_rows

SETS = {"train": "train", "valid": "dev", "test": "test"}  # S3PRL's name of a split: ours
TASKS = ("auto", "ks", "ic", "sid")
NEEDED = {"ks": WORDS, "ic": "utt2intent"}  # what each set must have


def choose_task(task: str, dump_dir: Path) -> str:
    """Return the task for ``auto``: keywords when every set has the times of its words, else intents when every set
    has them, else speakers. ValueError for an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"--task {task}: one of {', '.join(TASKS)}")
    if task != "auto":
        return task
    for name, table in NEEDED.items():
        if all((dump_dir / folder / table).is_file() for folder in SETS.values()):
            return name
    return "sid"


def write_lists(task: str, dump_dir: Path, out_dir: Path, keywords: KeywordOptions | None = None) -> dict[str, int]:
    """Write ``{train,valid,test}.csv`` of ``task`` into ``out_dir`` and return the number of examples of each.

    An example is a word for ``ks``, cut out as ``keywords`` says, and an utterance for the others.
    """
    if task == "ks":
        fields, rows = keyword_rows(dump_dir, SETS, keywords or KeywordOptions())
    else:
        fields, rows = _intent_rows(dump_dir) if task == "ic" else _speaker_rows(dump_dir)
    for split, lines in rows.items():
        if not lines:
            raise ValueError(f"{dump_dir}: no utterance for the {split} split of {task}; give a larger corpus")
        with atomic_path(out_dir / f"{split}.csv") as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as handle:
                csv.writer(handle).writerows([fields, *lines])
    return {split: len(lines) for split, lines in rows.items()}


def _intent_rows(dump_dir: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Take the sets as they are; every utterance needs the same number of slots."""
    rows, slots = {}, None
    for split, name in SETS.items():
        path = dump_dir / name / "utt2intent"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; intent classification needs it, --task sid does not")
        intents = read_table(path)
        rows[split] = []
        for utt in read_manifest(dump_dir / name):
            if utt.utt_id not in intents:
                raise ValueError(f"{path}: {utt.utt_id} has no line; give its slots, 'none' where one is absent")
            labels = intents[utt.utt_id].split()
            slots = slots or len(labels)
            if len(labels) != slots:
                raise ValueError(f"{path}: {utt.utt_id} has {len(labels)} slots, others have {slots}; use 'none'")
            rows[split].append([utt.utt_id, utt.path, " ; ".join(labels)])
    return ["id", "wav_path", "labels"], rows


def _speaker_rows(dump_dir: Path) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Split the training set's utterances of each speaker 70/15/15 in the order of their ids.

    Speakers must be known in training, and a corpus' own test speakers are not. A speaker with fewer than three
    utterances cannot be in all parts and is left out.
    """
    by_speaker: dict[str, list[Utterance]] = defaultdict(list)
    for utt in read_manifest(dump_dir / SETS["train"]):
        by_speaker[utt.speaker].append(utt)
    usable = {speaker: utts for speaker, utts in sorted(by_speaker.items()) if len(utts) >= 3}
    if len(usable) < 2:
        raise ValueError(
            f"{dump_dir / SETS['train']}/utt2spk: {len(usable)} speakers with three utterances or more; speaker "
            "identification needs two, and intent classification a file utt2intent in each set"
        )
    rows: dict[str, list[list[str]]] = {split: [] for split in SETS}
    for speaker, utts in usable.items():
        held_out = max(1, round(0.15 * len(utts)))
        bounds = {"train": (0, -2 * held_out), "valid": (-2 * held_out, -held_out), "test": (-held_out, None)}
        for split, (start, end) in bounds.items():
            rows[split] += [[utt.utt_id, utt.path, speaker] for utt in utts[start:end]]
    return ["id", "wav_path", "label"], rows
