"""Stage 2 against every bad input that a corpus can bring, under both policies."""

import numpy as np
import pytest
import soundfile

from espnet_mamba.data.audio import AudioError, read_audio
from espnet_mamba.data.audio_check import check_audio
from espnet_mamba.data.check import check_sets
from espnet_mamba.data.kaldi import read_ctm, read_table
from espnet_mamba.data.manifest import read_manifest

SETS = ("train", "dev", "test")


def tone(samples=16000):
    return (0.1 * np.sin(np.arange(samples) / 5)).astype(np.float32)


def write_wav(path, samples=None, rate=16000, **options):
    soundfile.write(path, tone() if samples is None else samples, rate, **options)
    return path


def with_nan(samples):
    samples[100] = np.nan
    samples[200] = np.inf
    return samples


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


BAD_FILES = {
    "missing": lambda path: path,
    "zero_bytes": lambda path: path.touch(),
    "unreadable": lambda path: path.write_bytes(b"this is no audio" * 100),
    "truncated": lambda path: truncate(write_wav(path)),
    "sample_rate": lambda path: write_wav(path, rate=8000),
    "channels": lambda path: write_wav(path, np.stack([tone(), tone()], axis=1)),
    "not_finite": lambda path: write_wav(path, with_nan(tone()), subtype="FLOAT"),
    "silence": lambda path: write_wav(path, np.zeros(16000)),
    "too_short": lambda path: write_wav(path, tone(1)),
    "amplitude": lambda path: write_wav(path, tone() * 32768, subtype="FLOAT"),
}


@pytest.mark.parametrize("reason", BAD_FILES)
def test_a_bad_file_is_named_with_reason_and_remedy(tmp_path, reason):
    path = tmp_path / "a.wav"
    BAD_FILES[reason](path)
    with pytest.raises(AudioError, match=str(path)) as caught:
        check_audio(str(path))
    assert caught.value.reason == reason and caught.value.remedy


def test_truncated_flac_is_named_and_so_is_one_without_a_length(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 32000)
    path = write_wav(tmp_path / "a.flac", noise)
    for share in (0.999, 0.5):
        with pytest.raises(AudioError, match="its header says 32000 samples") as caught:
            read_audio(truncate(path, share))
        assert caught.value.reason == "truncated"
    data = bytearray(write_wav(tmp_path / "b.flac", noise).read_bytes())
    data[21] &= 0xF0  # the 36 bits of STREAMINFO's number of samples
    data[22:26] = bytes(4)
    (tmp_path / "b.flac").write_bytes(data)
    with pytest.raises(AudioError, match="no length"):
        read_audio(tmp_path / "b.flac")


def test_a_wav_cut_by_one_sample_is_truncated(tmp_path):
    path = write_wav(tmp_path / "a.wav")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(AudioError, match=r"15999 samples decoded \(its header says 16000 samples\)"):
        read_audio(path)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
def test_sample_formats_are_read_to_the_same_signal(tmp_path, subtype):
    samples = read_audio(write_wav(tmp_path / "a.wav", subtype=subtype))
    assert samples.dtype == np.float32 and samples.shape == (16000,)
    assert np.abs(samples - tone()).max() < 1 / 100
    assert check_audio(str(tmp_path / "a.wav")) == 16000


def test_the_shortest_length_is_1040_samples(tmp_path):
    assert check_audio(str(write_wav(tmp_path / "a.wav", tone(1040)))) == 1040
    with pytest.raises(AudioError, match="1039 samples"):
        check_audio(str(write_wav(tmp_path / "b.wav", tone(1039))))
    assert check_audio(str(tmp_path / "b.wav"), min_samples=400) == 1039


@pytest.fixture
def corpus(tmp_path):
    """A good corpus of three sets with two utterances each, phones, words, intents, names with spaces and accents."""
    for name in SETS:
        folder = tmp_path / "data" / name
        (folder / "wav files é").mkdir(parents=True)
        for number in (1, 2):
            write_wav(folder / "wav files é" / f"{number} ü.wav", tone(16000 * number))
        lines = {
            "wav.scp": "{0}-{1} wav files é/{1} ü.wav",
            "text": "{0}-{1} WORD",
            "utt2spk": "{0}-{1} {0}",
            "phones.ctm": "{0}-{1} 1 0.0 0.5 sil\n{0}-{1} 1 0.5 0.5 AA",
            "words.ctm": "{0}-{1} 1 0.5 0.5 WORD",
            "utt2intent": "{0}-{1} open door none two",
        }
        for table, line in lines.items():
            (folder / table).write_text("".join(line.format(name, number) + "\n" for number in (1, 2)))
    return tmp_path / "data"


def check(corpus, policy="refuse"):
    check_sets(corpus, corpus.parent / "dump" / "raw", SETS, policy, nj=2)
    return corpus.parent / "dump" / "raw"


def add(corpus, table, line, name="train"):
    with open(corpus / name / table, "a") as handle:
        handle.write(line + "\n")


def remove(corpus, table, start, name="train"):
    path = corpus / name / table
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(start)))


def test_a_good_corpus_gives_the_same_ids_everywhere(corpus, capsys):
    dump = check(corpus)
    utterances = read_manifest(dump / "train")
    assert [u.utt_id for u in utterances] == ["train-1", "train-2"]
    assert [u.num_samples for u in utterances] == [16000, 32000]
    assert utterances[0].path == str(corpus.resolve() / "train" / "wav files é" / "1 ü.wav")
    assert list(read_ctm(dump / "train" / "phones.ctm")) == list(read_table(dump / "train" / "utt2intent"))
    assert read_ctm(dump / "train" / "words.ctm") == dict.fromkeys(["train-1", "train-2"], [(0.5, 1.0, "WORD")])
    assert "train: 2 utterances, 0.001 h (0.1 min), 1 speakers, seconds min 1.00 median 1.50 max 2.00" in (
        capsys.readouterr().out
    )
    assert not (dump / "train" / "rejected.tsv").exists()


def test_optional_tables_stay_optional(corpus):
    for name in SETS:
        for table in ("phones.ctm", "words.ctm", "utt2intent"):
            (corpus / name / table).unlink()
    dump = check(corpus)
    tables = ["manifest.tsv", "text", "utt2num_samples", "utt2spk", "wav.scp"]
    assert sorted(path.name for path in (dump / "dev").iterdir()) == tables


def damage_file(corpus, reason):
    path = corpus / "train" / "wav files é" / "2 ü.wav"
    path.unlink()
    BAD_FILES[reason](path)


# What is done to the corpus, the reason given, the utterance named.
BAD_UTTERANCES = {
    "text without audio": (lambda c: add(c, "text", "ghost WORD"), "no_audio", "ghost"),
    "audio without text": (lambda c: remove(c, "text", "train-2"), "no_text", "train-2"),
    "audio with empty text": (
        lambda c: (remove(c, "text", "train-2"), add(c, "text", "train-2")),
        "no_text",
        "train-2",
    ),
    "audio without speaker": (lambda c: remove(c, "utt2spk", "train-2"), "no_utt2spk", "train-2"),
    "phones of unknown audio": (lambda c: add(c, "phones.ctm", "ghost 1 0 1 AA"), "no_audio", "ghost"),
    "audio without phones": (lambda c: remove(c, "phones.ctm", "train-2"), "no_phones.ctm", "train-2"),
    "phones beyond the end": (lambda c: add(c, "phones.ctm", "train-2 1 1.0 1.02 B"), "phone_times", "train-2"),
    "phones that overlap": (lambda c: add(c, "phones.ctm", "train-2 1 0.9 0.5 B"), "phone_times", "train-2"),
    "words of unknown audio": (lambda c: add(c, "words.ctm", "ghost 1 0 1 BOO"), "no_audio", "ghost"),
    "audio without words": (lambda c: remove(c, "words.ctm", "train-2"), "no_words.ctm", "train-2"),
    "words beyond the end": (lambda c: add(c, "words.ctm", "train-2 1 1.0 1.02 B"), "word_times", "train-2"),
    "words that overlap": (lambda c: add(c, "words.ctm", "train-2 1 0.9 0.5 B"), "word_times", "train-2"),
    "intent of three slots": (
        lambda c: (remove(c, "utt2intent", "train-2"), add(c, "utt2intent", "train-2 a b c")),
        "intent_slots",
        "train-2",
    ),
    **{f"{reason} file": (lambda c, reason=reason: damage_file(c, reason), reason, "train-2") for reason in BAD_FILES},
}


@pytest.mark.parametrize("case", BAD_UTTERANCES)
def test_refuse_names_it_and_writes_nothing(corpus, capsys, case):
    damage, reason, utt_id = BAD_UTTERANCES[case]
    damage(corpus)
    with pytest.raises(ValueError, match="1 bad items"):
        check(corpus)
    report = capsys.readouterr().err
    assert any(utt_id in line and reason in line for line in report.splitlines())
    assert f"counts: {reason} 1" in report
    assert not (corpus.parent / "dump").exists()


@pytest.mark.parametrize("case", BAD_UTTERANCES)
def test_skip_leaves_it_out_and_lists_it(corpus, case):
    damage, reason, utt_id = BAD_UTTERANCES[case]
    damage(corpus)
    dump = check(corpus, "skip")
    expected = ["train-1", "train-2"] if utt_id == "ghost" else ["train-1"]
    for table in ("wav.scp", "text", "utt2spk", "utt2num_samples", "utt2intent"):
        assert list(read_table(dump / "train" / table)) == expected
    for table in ("phones.ctm", "words.ctm"):
        assert list(read_ctm(dump / "train" / table)) == expected
    rejected = (dump / "train" / "rejected.tsv").read_text().splitlines()
    assert len(rejected) == 2 and rejected[1].startswith(f"{utt_id}\t{reason}\t")


def test_refuse_lists_all_items_of_all_sets(corpus, capsys):
    (corpus / "train" / "wav files é" / "1 ü.wav").unlink()
    write_wav(corpus / "dev" / "wav files é" / "2 ü.wav", rate=8000)
    add(corpus, "text", "ghost A", "test")
    with pytest.raises(ValueError, match="3 bad items"):
        check(corpus)
    report = capsys.readouterr().err
    assert all(word in report for word in ("train-1", "dev-2", "ghost", "counts: missing 1, no_audio 1, sample_rate 1"))


def test_refuse_leaves_an_earlier_dump_as_it_was(corpus):
    dump = check(corpus)
    before = {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()}
    (corpus / "test" / "wav files é" / "1 ü.wav").unlink()
    add(corpus, "utt2spk", "train-2 somebody")
    with pytest.raises(ValueError):
        check(corpus)
    assert {path: path.read_bytes() for path in dump.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_broken_tables_are_refused_under_both_policies_and_all_listed(corpus, capsys, policy):
    add(corpus, "wav.scp", "train-1 other.wav")
    add(corpus, "text", "dev-1 AGAIN", "dev")
    add(corpus, "phones.ctm", "dev-1 1 AA", "dev")
    add(corpus, "words.ctm", "dev-1 1 0.5 -0.5 A", "dev")
    add(corpus, "wav.scp", "test-3 sox a.mp3 -t wav - |", "test")
    (corpus / "test" / "utt2spk").unlink()
    with pytest.raises(ValueError, match="6 problems in the tables"):
        check(corpus, policy)
    report = capsys.readouterr().err
    for words in ("duplicate id 'train-1'", "duplicate id 'dev-1'", "phones.ctm:5", "words.ctm:3", "is a pipe"):
        assert words in report
    assert "utt2spk: no such" in report
    assert not (corpus.parent / "dump").exists()


def test_a_missing_set_is_named(corpus, capsys):
    with pytest.raises(ValueError):
        check_sets(corpus, corpus.parent / "dump", ["train", "nowhere"])
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_an_empty_set_is_refused(corpus, policy):
    for table in ("wav.scp", "text", "utt2spk", "phones.ctm", "words.ctm", "utt2intent"):
        (corpus / "dev" / table).write_text("")
    with pytest.raises(ValueError, match="data/dev: no usable utterance"):
        check(corpus, policy)
    assert not (corpus.parent / "dump").exists()


def test_a_set_emptied_by_skipping_is_refused(corpus):
    for number in (1, 2):
        (corpus / "dev" / "wav files é" / f"{number} ü.wav").unlink()
    with pytest.raises(ValueError, match="data/dev: no usable utterance"):
        check(corpus, "skip")


def test_unsorted_tables_are_sorted_with_a_notice(corpus, capsys):
    path = corpus / "train" / "wav.scp"
    path.write_text("".join(reversed(path.read_text().splitlines(True))))
    dump = check(corpus)
    assert list(read_table(dump / "train" / "wav.scp")) == ["train-1", "train-2"]
    assert "train/wav.scp is not sorted" in capsys.readouterr().out


def test_shared_speakers_are_said(corpus, capsys):
    path = corpus / "test" / "utt2spk"
    path.write_text("test-1 train\ntest-2 test\n")
    check(corpus)
    assert "note: train and test share 1 speakers" in capsys.readouterr().out


def test_ten_milliseconds_beyond_the_end_are_allowed(corpus):
    add(corpus, "phones.ctm", "train-1 1 1.0 0.01 B")
    check(corpus)


def test_unknown_policy_and_limit_are_refused(corpus):
    with pytest.raises(ValueError, match="'ignore': must be one of refuse, skip"):
        check(corpus, "ignore")
    with pytest.raises(ValueError, match="min_samples 399"):
        check_sets(corpus, corpus.parent / "dump", SETS, min_samples=399)
