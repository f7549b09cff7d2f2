"""The spoken corpus: the same bytes every time, voices and sentences kept apart, phone times that are true."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import soundfile

from espnet_mamba.data.audio import read_audio
from espnet_mamba.data.kaldi import read_ctm, read_table
from espnet_mamba.data.synth.corpus import make_corpus, plan, word_segments
from espnet_mamba.data.synth.grammar import NONE, SLOTS, TEMPLATES, VALUES, sentences, vocabulary
from espnet_mamba.data.synth.phones import PHONES, Phone, phone_segments
from espnet_mamba.data.synth.speaker import Speaker, Speech
from espnet_mamba.data.synth.voices import MAX_VOICES, voices_of_sets

SETS = ("train", "dev", "test")
pytest.importorskip("espeakng_loader", reason="needs the extra [mini]")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("synth") / "data"
    make_corpus(out_dir, minutes=2, num_voices=20, seed=0, nj=1)
    return out_dir


def contents(folder):
    """Return every file's bytes; wav.scp holds the folder's own place and is left out."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "wav.scp")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_bytes_again_for_any_number_of_processes(corpus, tmp_path):
    make_corpus(tmp_path / "data", minutes=2, num_voices=20, seed=0, nj=3)
    assert contents(tmp_path / "data") == contents(corpus)


def test_an_utterance_does_not_depend_on_what_was_spoken_before():
    # In one espeak process it does: this fails when the library is not loaded afresh.
    with Speaker() as fresh:
        alone = fresh.say("lock the clock", "en-us+m3", 50, 160)
    with Speaker() as used:
        used.say("open the oven in the kitchen", "en-gb-scotland+m7", 40, 170)
        after = used.say("lock the clock", "en-us+m3", 50, 160)
    assert np.array_equal(alone.samples, after.samples) and alone.phones == after.phones


def test_another_seed_gives_other_speech(corpus):
    texts = {job.sentence.text for job in plan(2, 20, seed=1)["train"]}
    assert texts != set(read_table(corpus / "train" / "text").values())


def test_voices_and_sentences_are_disjoint_between_sets(corpus):
    speakers = {name: set(read_table(corpus / name / "utt2spk").values()) for name in SETS}
    assert [len(speakers[name]) for name in SETS] == [14, 2, 4]
    assert len(set.union(*speakers.values())) == 20
    jobs = plan(25, 20, 0)
    texts = {name: {job.sentence.text for job in jobs[name]} for name in SETS}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["dev"] and not texts["dev"] & texts["test"]
    vocal_tracts = [voice.name.split("+")[1] for voices in voices_of_sets(MAX_VOICES).values() for voice in voices]
    assert len(set(vocal_tracts)) == len(vocal_tracts)


def test_default_plan_is_large_enough():
    jobs = plan(25, 20, 0)
    assert len(jobs["test"]) >= 60
    for index, slot in enumerate(SLOTS):
        seen = {job.sentence.intent[index] for job in jobs["train"]}
        assert seen == {value.lower() for value in VALUES[slot]} | {NONE}


def test_small_corpus_still_shows_every_intent_in_train(corpus):
    intents = [line.split() for line in read_table(corpus / "train" / "utt2intent").values()]
    for index, slot in enumerate(SLOTS):
        assert {intent[index] for intent in intents} == {value.lower() for value in VALUES[slot]} | {NONE}


def test_length_follows_minutes(corpus):
    seconds = sum(soundfile.info(path).duration for path in corpus.rglob("*.flac"))
    assert 1.7 <= seconds / 60 <= 2.5


def test_vocabulary_is_small_and_upper_case():
    assert len(vocabulary()) <= 60
    assert all(word.isalpha() and word.isupper() for word in vocabulary())


def test_intents_are_what_the_text_says(corpus):
    for name in SETS:
        texts, intents = read_table(corpus / name / "text"), read_table(corpus / name / "utt2intent")
        assert list(texts) == list(intents)
        for utt_id, text in texts.items():
            words = text.lower().split()
            for slot, value in zip(SLOTS, intents[utt_id].split(), strict=True):
                said = [word for word in words if word.upper() in VALUES[slot]]
                assert said == ([] if value == NONE else [value]), (utt_id, text, slot)


def test_templates_and_values_are_balanced():
    made = sentences(10 * len(TEMPLATES), "0", set())
    counts = Counter(sentence.intent[0] for sentence in made)
    del counts[NONE]
    assert max(counts.values()) - min(counts.values()) <= 1


def test_audio_is_16_khz_mono_16_bit_and_neither_silent_nor_clipped(corpus):
    for path in corpus.rglob("*.flac"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype, info.format) == (16000, 1, "PCM_16", "FLAC")
        samples = read_audio(path)
        assert 0.05 < np.abs(samples).max() < 0.999
        # Noise is everywhere: no 20 ms of digital silence, and it is far below the speech.
        frames = np.sqrt((samples[: len(samples) // 320 * 320].reshape(-1, 320) ** 2).mean(axis=1))
        assert 0 < frames.min() < 0.15 * frames.max()


def test_phones_cover_the_audio_without_gap_or_overlap(corpus):
    known = set(PHONES.values()) | {"sil"}
    for name in SETS:
        wavs, phones = read_table(corpus / name / "wav.scp"), read_ctm(corpus / name / "phones.ctm")
        assert list(wavs) == list(phones)
        for utt_id, segments in phones.items():
            assert segments[0].start == 0 and segments[0].label == segments[-1].label == "sil"
            assert segments[-1].end == pytest.approx(soundfile.info(wavs[utt_id]).frames / 16000, abs=1e-6)
            for one, following in zip(segments, segments[1:], strict=False):
                assert one.end == pytest.approx(following.start, abs=1e-6) and one.end > one.start
                assert {one.label, following.label} <= known and (one.label, following.label) != ("sil", "sil")


def test_phone_times_are_where_the_sound_is(corpus):
    """In the written audio the level falls where a voiceless stop begins, and speech is louder than ``sil``."""
    falls, in_sil, in_vowel = [], [], []
    for name in SETS:
        wavs = read_table(corpus / name / "wav.scp")
        for utt_id, segments in read_ctm(corpus / name / "phones.ctm").items():
            samples = read_audio(wavs[utt_id])
            for one, following in zip(segments, segments[1:], strict=False):
                boundary = round(following.start * 16000)
                if one.label != "sil" and following.label in {"P", "T", "K", "CH"}:
                    falls.append(level(samples[boundary - 240 : boundary - 80]) - level(samples[boundary + 80 :][:160]))
                whole = level(samples[round(one.start * 16000) : round(one.end * 16000)])
                if one.label == "sil":
                    in_sil.append(whole)
                elif one.label in {"AA", "AE", "IY", "OW", "EY"}:
                    in_vowel.append(whole)
    assert len(falls) > 100 and np.median(falls) > 12 and np.mean(np.array(falls) > 3) > 0.9
    assert np.percentile(in_sil, 95) < np.percentile(in_vowel, 5)


def level(samples):
    return 10 * np.log10(np.mean(samples.astype(np.float64) ** 2) + 1e-12)


def test_a_closure_goes_to_its_stop_and_a_pause_does_not():
    # Sound 0..1000, 40 ms of silence (882), a stop's burst at 1882; then a pause of 0.2 s that espeak reports itself.
    samples = np.zeros(8000, dtype=np.int16)
    samples[100:1000] = samples[1882:3000] = samples[7410:8000] = 5000
    phones = [(100, "'aI", 0), (1882, "t", 2), (3000, "_:", 3), (7410, "k", 5)]
    segments = phone_segments(Speech("i t, k", 22050, samples, phones))
    assert [(round(s.start * 22050), round(s.end * 22050), s.label, s.word) for s in segments] == [
        (0, 100, "sil", -1),
        (100, 1000, "AY", 0),
        (1000, 3000, "T", 1),
        (3000, 7410, "sil", -1),
        (7410, 8000, "K", 2),
    ]


def test_an_unknown_mnemonic_is_named():
    with pytest.raises(ValueError, match="'q7' has no label"):
        phone_segments(Speech("a", 22050, np.zeros(100, dtype=np.int16), [(0, "q7", 0)]))


def test_words_are_those_of_the_text_and_made_of_whole_phones(corpus):
    joined = 0
    for name in SETS:
        texts, words = read_table(corpus / name / "text"), read_ctm(corpus / name / "words.ctm")
        phones = read_ctm(corpus / name / "phones.ctm")
        assert list(words) == list(texts)
        for utt_id, segments in words.items():
            assert " ".join(segment.label for segment in segments) == texts[utt_id]
            joined += " IN THE " in texts[utt_id] or " OF THE " in texts[utt_id]
            # Every phone lies in exactly one word, every sil in none, and a word begins and ends with a phone.
            spoken = [phone for phone in phones[utt_id] if phone.label != "sil"]
            inside = [[p for p in spoken if a < p.start + 1e-6 and p.end < b + 1e-6] for a, b, _ in segments]
            assert sum(inside, []) == spoken
            for segment, own in zip(segments, inside, strict=True):
                assert (own[0].start, own[-1].end) == pytest.approx((segment.start, segment.end), abs=1e-6)
                if segment.label in FIRST_AND_LAST:
                    first, last = FIRST_AND_LAST[segment.label]
                    assert own[0].label in first and own[-1].label in last, (utt_id, segment)
    assert joined > 10


# Words as every dialect speaks them; THE, IN and OF are those that espeak joins.
FIRST_AND_LAST = {
    "THE": ({"DH", "D"}, {"AX", "IH", "IY"}),
    "IN": ({"IH"}, {"N"}),
    "OF": ({"AH", "AA", "AX"}, {"V"}),
    "PLEASE": ({"P"}, {"Z"}),
    "NUMBER": ({"N"}, {"AXR", "AX", "R", "ER"}),
    "KITCHEN": ({"K"}, {"N"}),
    "STOP": ({"S"}, {"P"}),
}


def test_a_word_that_espeak_joined_begins_at_its_own_phone():
    phones = [(0, "I", 0), (20, "n", 0), (40, "d", 0), (60, "@2", 0), (70, ";", 0), (80, "b", 7)]
    segments = phone_segments(Speech("in the b", 100, np.full(100, 5000, dtype=np.int16), phones))
    words = word_segments(segments, ["IN", "THE", "B"])
    assert words == [(0, 0.4, "IN"), (0.4, 0.8, "THE"), (0.8, 1, "B")]


@pytest.mark.parametrize(("text", "phones", "word"), [("in a", ["I", "n", "@"], "'a'"), ("the in", ["D"], "'in'")])
def test_a_joined_word_that_cannot_be_told_apart_is_named(text, phones, word):
    speech = Speech(text, 100, np.zeros(100, dtype=np.int16), [(at, name, 0) for at, name in enumerate(phones)])
    with pytest.raises(ValueError, match=f"no phones for {word} alone"):
        phone_segments(speech)


def test_a_word_without_a_phone_is_named():
    with pytest.raises(ValueError, match="word 2, DOOR, of 'OPEN DOOR'"):
        word_segments([Phone(0, 1, "AA", 0), Phone(1, 2, "sil", -1)], ["OPEN", "DOOR"])


def test_every_sentence_form_gives_its_words_in_every_voice():
    made = sentences(len(TEMPLATES), "words", set())
    with Speaker() as speaker:
        for number, voice in enumerate(voice for voices in voices_of_sets(MAX_VOICES).values() for voice in voices):
            for sentence in made[number % 4 :: 4]:  # a quarter each
                speech = speaker.say(sentence.spoken.lower(), voice.name, voice.pitch, voice.rate)
                words = word_segments(phone_segments(speech), sentence.text.split())
                ends = [0.0, *(word.end for word in words)]
                assert all(start < word.end and start <= word.start for start, word in zip(ends, words, strict=False))


def test_every_voice_can_say_every_word():
    with Speaker() as speaker:
        for voice in (voice for voices in voices_of_sets(MAX_VOICES).values() for voice in voices):
            speech = speaker.say(" ".join(vocabulary()).lower(), voice.name, voice.pitch, voice.rate)
            phones = phone_segments(speech)
            assert len(phones) > 150 and {phone.word for phone in phones} >= set(range(len(vocabulary())))
            assert np.abs(speech.samples.astype(int)).max() > 5000


def test_espeak_problems_are_named():
    with Speaker() as speaker:
        with pytest.raises(ValueError, match="no voice 'xx-nowhere'"):
            speaker.say("hello", "xx-nowhere", 50, 160)
        assert len(speaker.say("hello", "en", 50, 160).samples) > 5000  # and the helper goes on


def test_missing_espeak_gives_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install espnet-mamba\[mini\]"):
        Speaker()


def loaded_after(statement, names):
    """Return those of ``names`` that a fresh interpreter has in sys.modules after ``statement``."""
    code = f"import sys\n{statement}\nprint(*(name for name in {names!r} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_the_package_never_loads_espeak_and_the_helper_nothing_heavy():
    assert loaded_after("import espnet_mamba.data.synth.corpus", ["espeakng_loader", "numpy"]) == ["numpy"]
    assert loaded_after("import espnet_mamba.data.synth.worker", ["numpy", "torch", "scipy", "json"]) == ["json"]


@pytest.mark.parametrize(("minutes", "num_voices", "words"), [(0, 20, "minutes 0"), (2, 4, "voices 4"), (2, 99, "99")])
def test_settings_out_of_range_are_refused(tmp_path, minutes, num_voices, words):
    with pytest.raises(ValueError, match=words):
        make_corpus(tmp_path / "data", minutes, num_voices)
    assert not (tmp_path / "data").exists()


def test_a_users_recordings_are_not_overwritten(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.wav").touch()
    with pytest.raises(ValueError, match=r"mine\.wav"):
        make_corpus(tmp_path, minutes=1)


def test_a_failure_in_the_middle_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("espnet_mamba.data.synth.corpus.record", lambda speech, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_corpus(tmp_path / "data", minutes=1)
    assert not (tmp_path / "data").exists()
