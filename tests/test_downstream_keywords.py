"""Keyword spotting's lists from a hand-made words.ctm, the choice of the task, and how its words are counted."""

from __future__ import annotations

import csv
from collections import Counter

import pytest
from test_downstream_lists import make_dump

from espnet_mamba.data.kaldi import write_table
from s3prl_upstream import superb_run
from s3prl_upstream.superb_data import choose_task, write_lists
from s3prl_upstream.superb_keywords import KeywordOptions, utterance_of

SETS = ("train", "dev", "test")
EVERY = {name: [("OPEN", 0.2), ("DOOR", 0.5)] for name in SETS}


def make_words(folder, spoken, length=0.1, utterances=1):
    """Write sets whose utterances of one second all hold the words ``spoken[set]`` = [(word, start), ...]."""
    for name, words in spoken.items():
        utts = [f"ann-{name}{i:02d}" for i in range(utterances)]
        write_table(folder / name / "wav.scp", {utt: f"/audio/{utt}.wav" for utt in utts})
        write_table(folder / name / "utt2spk", dict.fromkeys(utts, "ann"))
        write_table(folder / name / "utt2num_samples", dict.fromkeys(utts, "16000"))
        lines = [f"{utt} 1 {start} {length} {word}\n" for utt in utts for word, start in words]
        (folder / name / "words.ctm").write_text("".join(lines))
    return folder


def lists(dump, out, **options):
    counts = write_lists("ks", dump, out, KeywordOptions(**options))
    tables = {}
    for split in counts:
        with open(out / f"{split}.csv", newline="", encoding="utf-8") as handle:
            tables[split] = list(csv.DictReader(handle))
    assert counts == {split: len(rows) for split, rows in tables.items()}
    return tables


def labels(rows):
    return sorted({row["label"] for row in rows})


def test_words_are_cut_out_with_a_margin_that_stays_inside(tmp_path):
    spoken = EVERY | {"test": [("OPEN", 0.02), ("DOOR", 0.88)]}
    rows = lists(make_words(tmp_path / "raw", spoken), tmp_path / "lists")
    assert rows["test"] == [
        {"id": "ann-test00#000", "wav_path": "/audio/ann-test00.wav", "label": "OPEN"}
        | {"start_sec": "0.0000", "end_sec": "0.1700"},
        {"id": "ann-test00#001", "wav_path": "/audio/ann-test00.wav", "label": "DOOR"}
        | {"start_sec": "0.8300", "end_sec": "1.0000"},
    ]
    rows = lists(make_words(tmp_path / "raw", spoken), tmp_path / "lists", margin=0.0)
    assert (rows["test"][0]["start_sec"], rows["test"][0]["end_sec"]) == ("0.0200", "0.1200")


def test_classes_are_the_most_frequent_long_words_and_ties_go_by_the_alphabet(tmp_path):
    words = [("THE", 0.1), ("IT'S", 0.2), ("[noise]", 0.3), ("NULL", 0.4), ("ZERO", 0.5), ("LAMP", 0.6), ("DON'T", 0.7)]
    spoken = dict.fromkeys(SETS, [*words, ("ZERO", 0.8), ("ABLE", 0.9)])
    rows = lists(make_words(tmp_path / "raw", spoken), tmp_path / "lists", num_keywords=3)
    assert all(labels(rows[split]) == ["ABLE", "DON'T", "ZERO"] for split in rows)


def test_a_word_that_a_set_lacks_is_replaced_and_named(tmp_path, capsys):
    train = [("OPEN", 0.1), ("OPEN", 0.2), ("LAMP", 0.3), ("LAMP", 0.4), ("DOOR", 0.5)]
    spoken = {"train": train, "dev": [("OPEN", 0.1), ("DOOR", 0.2)], "test": train}
    rows = lists(make_words(tmp_path / "raw", spoken), tmp_path / "lists", num_keywords=2)
    assert all(labels(rows[split]) == ["DOOR", "OPEN"] for split in rows)
    assert "keyword LAMP: no example in dev, the next word takes its place" in capsys.readouterr().out


def test_caps_hold_per_word_and_the_choice_hardly_moves_with_the_corpus(tmp_path):
    dump = make_words(tmp_path / "raw", EVERY, utterances=9)
    options = {"max_per_word_train": 5, "max_per_word_test": 3}
    rows = lists(dump, tmp_path / "lists", **options)
    per_split = {split: set(Counter(row["label"] for row in rows[split]).values()) for split in rows}
    assert per_split == {"train": {5}, "valid": {3}, "test": {3}}
    assert [row["id"] for row in rows["train"]] == sorted(row["id"] for row in rows["train"])
    other_seed = lists(dump, tmp_path / "lists", **options, seed=1)
    assert rows["train"] != other_seed["train"]
    more = lists(make_words(tmp_path / "raw", EVERY, utterances=10), tmp_path / "lists", **options)
    replaced = {row["id"] for row in rows["train"]} - {row["id"] for row in more["train"]}
    assert len(replaced) <= 2  # a tenth utterance takes the place of one example a word at most


def test_too_short_words_are_left_out_and_said(tmp_path, capsys):
    dump = make_words(tmp_path / "raw", EVERY, length=0.064)
    with pytest.raises(ValueError, match="0 words of 4 letters or more occur in the words.ctm of every set"):
        lists(dump, tmp_path / "lists", margin=0.0)
    assert "2 words shorter than 1040 samples are left out" in capsys.readouterr().out
    rows = lists(make_words(tmp_path / "raw", EVERY, length=0.066), tmp_path / "lists", margin=0.0)
    assert len(rows["train"]) == 2


def test_one_word_is_no_task(tmp_path):
    dump = make_words(tmp_path / "raw", dict.fromkeys(SETS, [("OPEN", 0.1)]))
    with pytest.raises(ValueError, match=r"raw: 1 words .* \(train, dev, test\); keyword spotting needs two"):
        lists(dump, tmp_path / "lists")
    (dump / "dev" / "words.ctm").unlink()
    with pytest.raises(ValueError, match="dev/words.ctm: no such file; keyword spotting needs the times of words"):
        lists(dump, tmp_path / "lists")


def test_auto_prefers_words_then_intents_then_speakers(tmp_path):
    dump = make_words(make_dump(tmp_path / "raw", 1, "play music"), EVERY)
    assert choose_task("auto", dump) == "ks" and choose_task("ic", dump) == "ic"
    (dump / "test" / "words.ctm").unlink()
    assert choose_task("auto", dump) == "ic"
    (dump / "dev" / "utt2intent").unlink()
    assert choose_task("auto", dump) == "sid"


def test_words_of_one_utterance_are_drawn_together():
    assert utterance_of("a#b#003") == "a#b" and utterance_of("ann-00") == "ann-00"
    rows = {"u#000": ("OPEN", "OPEN"), "u#001": ("DOOR", "OPEN"), "v#000": ("DOOR", "DOOR")}
    table = {name: {"prediction": found, "label": label} for name, (found, label) in rows.items()}
    assert [counts.tolist() for counts in superb_run.exact_counts(table)] == [[1, 1], [2, 1]]
    result = superb_run._result("ks", "fbank", table)
    assert (result["metric"], result["num_utts"], result["num_examples"]) == ("accuracy", 2, 3)
    assert result["value"] == pytest.approx(2 / 3) and result["low"] == 0.5  # the draw of u alone
    assert result["num_classes"] == 2


def test_an_unknown_option_of_the_lists_is_refused(tmp_path):
    config = tmp_path / "a.yaml"
    config.write_text("ks: {keywords: {number: 3}}\n")
    dump = make_words(tmp_path / "raw", EVERY)
    with pytest.raises(ValueError, match="a.yaml: keywords: 'number' is no option"):
        superb_run.run_systems(config, "ks", dump, tmp_path / "out", [], {}, 1)
