"""Counts of errors by hand, intervals that cover, tokens in ESPnet's order, and refusals that name the cause."""

from __future__ import annotations

import numpy as np
import pytest

from espnet_mamba.asr import bootstrap, scoring
from espnet_mamba.asr.systems import parse_systems
from espnet_mamba.asr.tokens import make_tokens


def test_counts_by_hand():
    counts = scoring.word_errors(
        ["switch on the light", "play music", "stop", ""], ["switch of light now", "", "stop", "uh oh"]
    )
    # 1: on -> of, the -> light or deleted and inserted: three errors either way; 2: both deleted; 4: both inserted
    assert counts.errors.tolist() == [3, 2, 0, 2]
    assert counts.deletions.tolist()[1] == 2
    assert counts.insertions.tolist()[3] == 2
    assert counts.totals.tolist() == [4, 2, 1, 0]


def test_characters_count_one_space_between_words():
    counts = scoring.char_errors(["a  b"], ["ab"])
    assert (counts.deletions[0], counts.totals[0]) == (1, 3)


def test_score_keeps_an_utterance_without_hypothesis():
    result = scoring.score("random", {"a": "one two", "b": "three four"}, {"a": "one two"})
    assert result["wer"] == 0.5
    assert (result["deletions"], result["num_utts"], result["num_empty"]) == (2, 2, 1)
    assert result["wer_low"] <= 0.5 <= result["wer_high"]


def test_score_names_a_hypothesis_without_reference():
    with pytest.raises(ValueError, match="utt9: hypothesis without a reference"):
        scoring.score("random", {"a": "x"}, {"utt9": "x"})


def test_interval_covers_the_true_rate_about_19_times_in_20():
    generator = np.random.default_rng(3)
    totals = np.full(200, 8)
    covered = 0
    for trial in range(100):
        interval = bootstrap.rate(generator.binomial(8, 0.2, 200), totals, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 88 <= covered <= 100


def test_paired_difference_is_narrower_than_the_two_intervals():
    generator = np.random.default_rng(1)
    difficulty = generator.integers(0, 7, 100)
    totals = np.full(100, 8)
    better, worse = difficulty, difficulty + (generator.random(100) < 0.5)
    found = bootstrap.difference(better, worse, totals)
    assert found.value < 0 and found.high < 0
    alone = bootstrap.rate(better, totals)
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_bootstrap_is_repeatable_and_refuses_nothing_to_score():
    errors, totals = np.arange(10), np.full(10, 12)
    assert bootstrap.rate(errors, totals) == bootstrap.rate(errors, totals)
    with pytest.raises(ValueError, match="no utterance to score"):
        bootstrap.rate(errors[:0], totals[:0])


def test_comparison_subtracts_random():
    references = {"a": "one two", "b": "three four"}
    found = scoring.compare(references, {"pretrained": references, "random": {"a": "one two", "b": "x y"}}, "random")
    assert found["difference"]["value"] == -0.5
    assert found["difference"] == found["differences"]["pretrained"]


def test_tokens_stand_in_espnets_order_and_spell_the_text(tmp_path, capsys):
    sentencepiece = pytest.importorskip("sentencepiece")
    count = make_tokens(["play music now", "stop the music", ""] * 3, 60, tmp_path)
    tokens = (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:2] == ["<blank>", "<unk>"] and tokens[-1] == "<sos/eos>"
    assert len(tokens) == len(set(tokens)) == count < 60
    assert f"cut from 60 to {count}" in capsys.readouterr().out
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    assert set(model.encode("stop music now", out_type=str)) <= set(tokens)


def test_too_few_pieces_says_how_many_are_needed(tmp_path):
    with pytest.raises(ValueError, match=r"--nbpe 5 is fewer .* give at least (\d+)") as caught:
        make_tokens(["play music now"], 5, tmp_path)
    needed = int(str(caught.value).split()[-1])
    make_tokens(["play music now"], needed, tmp_path)


def test_no_transcript_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no transcript"):
        make_tokens(["", " "], 30, tmp_path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pretrained", "write NAME=SOURCE"),
        ("best=logmel", "the name is one of pretrained, random, fbank"),
        ("random=/nowhere/upstream", "no such upstream folder; the stage 'upstream' makes it"),
    ],
)
def test_a_wrong_system_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_systems([spec])


def test_systems_come_in_the_fixed_order(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch()
    specs = ["fbank=logmel", f"random={tmp_path}", f"pretrained={tmp_path}"]
    assert [system.name for system in parse_systems(specs)] == ["pretrained", "random", "fbank"]
    with pytest.raises(ValueError, match="given twice"):
        parse_systems(["fbank=logmel", "fbank=fbank"])
