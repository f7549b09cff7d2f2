"""Keyword spotting's lists: the most frequent words of a corpus, cut out of its utterances by ``words.ctm``."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from espnet_mamba.data.kaldi import read_ctm
from espnet_mamba.data.manifest import read_manifest

WORDS = "words.ctm"
SAMPLE_RATE = 16000
MIN_SAMPLES = 1040  # 0.065 s: S3PRL refuses what some convolutional front ends make of shorter waveforms
MIN_LETTERS = 4
MARK = "#"  # between the utterance and the place of the word in an example's id
READ_AS_MISSING = {"NULL", "null", "None"}  # pandas takes these words for empty cells


@dataclass(frozen=True)
class KeywordOptions:
    """How many classes, how many examples of each at most, and the seed by which they are picked."""

    num_keywords: int = 12
    max_per_word_train: int = 60
    max_per_word_test: int = 40  # holds for the valid split too
    margin: float = 0.05  # seconds of context on both sides
    seed: int = 0


@dataclass(frozen=True)
class Example:
    """One spoken word; times in seconds from the utterance's first sample."""

    id: str
    path: str
    word: str
    start: float
    end: float


def keyword_rows(
    dump_dir: Path, sets: dict[str, str], options: KeywordOptions
) -> tuple[list[str], dict[str, list[list[str]]]]:
    """Return the column names and the rows of each split of ``sets`` (split -> set of ``dump_dir``).

    The classes are the most frequent words of the split ``train``; one that another split lacks is replaced by the
    next, which is printed. Raises ValueError when fewer than two words are left or a set has no ``words.ctm``.
    """
    examples = {split: _examples(dump_dir / name, options) for split, name in sets.items()}
    words = choose_words(examples, sets, options.num_keywords)
    if len(words) < 2:
        raise ValueError(
            f"{dump_dir}: {len(words)} words of {MIN_LETTERS} letters or more occur in the {WORDS} of every set "
            f"({', '.join(sets.values())}); keyword spotting needs two: give a larger corpus or another --task"
        )
    rows = {}
    for split, by_word in examples.items():
        most = options.max_per_word_train if split == "train" else options.max_per_word_test
        kept = [example for word in words for example in _pick(by_word[word], most, options.seed)]
        kept.sort(key=lambda example: example.id)
        rows[split] = [[e.id, e.path, e.word, f"{e.start:.4f}", f"{e.end:.4f}"] for e in kept]
    return ["id", "wav_path", "label", "start_sec", "end_sec"], rows


def choose_words(examples: dict[str, dict[str, list[Example]]], sets: dict[str, str], num_keywords: int) -> list[str]:
    """Return the most frequent words of ``train`` that every split has, ties by the alphabet; print the others."""
    train = examples["train"]
    words: list[str] = []
    for word in sorted(train, key=lambda word: (-len(train[word]), word)):
        if len(words) == num_keywords:
            break
        lacking = [sets[split] for split in examples if word not in examples[split]]
        if lacking:
            print(f"keyword {word}: no example in {' and '.join(lacking)}, the next word takes its place", flush=True)
        else:
            words.append(word)
    return words


def utterance_of(example_id: str) -> str:
    """Return the utterance that an example's id names; other ids are utterances themselves."""
    return example_id.rsplit(MARK, 1)[0]


def _examples(folder: Path, options: KeywordOptions) -> dict[str, list[Example]]:
    """Return the usable words of a set with their places."""
    path = folder / WORDS
    if not path.is_file():
        raise ValueError(f"{path}: no such file; keyword spotting needs the times of words, --task sid does not")
    spoken = read_ctm(path)
    found: dict[str, list[Example]] = defaultdict(list)
    short = 0
    for utt in read_manifest(folder):
        for place, segment in enumerate(spoken.get(utt.utt_id, [])):
            start = round(max(0.0, segment.start - options.margin), 4)
            end = round(min(utt.num_samples / SAMPLE_RATE, segment.end + options.margin), 4)
            if not _is_keyword(segment.label):
                continue
            if int((end - start) * SAMPLE_RATE) < MIN_SAMPLES:
                short += 1
                continue
            example = Example(f"{utt.utt_id}{MARK}{place:03d}", utt.path, segment.label, start, end)
            found[segment.label].append(example)
    if short:
        print(f"{path}: {short} words shorter than {MIN_SAMPLES} samples are left out", flush=True)
    return found


def _is_keyword(word: str) -> bool:
    letters = sum(letter.isalpha() for letter in word)
    return letters >= MIN_LETTERS and letters == len(word.replace("'", "")) and word not in READ_AS_MISSING


def _pick(examples: list[Example], most: int, seed: int) -> list[Example]:
    """Return at most ``most`` examples, by a hash of their ids: which ones does not depend on the others' order."""

    def draw(example: Example) -> str:
        return hashlib.sha256(f"{seed} {example.id}".encode()).hexdigest()

    return sorted(examples, key=draw)[:most]
