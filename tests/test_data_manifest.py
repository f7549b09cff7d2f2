"""The manifest: built in parallel, resumed where it was interrupted, and told from audio that changed since."""

import json
import os

import numpy as np
import pytest
import soundfile

from espnet_mamba.data import audio_check, check_journal
from espnet_mamba.data.audio import AudioError, read_bytes
from espnet_mamba.data.check import check_sets
from espnet_mamba.data.check_journal import AudioFacts, CheckJournal
from espnet_mamba.data.compact_table import CompactTable, read_lengths
from espnet_mamba.data.kaldi import read_table
from espnet_mamba.data.manifest import changed_audio, read_facts, read_manifest


@pytest.fixture
def corpus(tmp_path):
    """Forty noises with their lists."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data/train"
    folder.mkdir(parents=True)
    ids = [f"u{i:02d}" for i in range(40)]
    for utt in ids:
        soundfile.write(folder / f"{utt}.flac", rng.normal(0, 0.1, int(rng.integers(1500, 3000))), 16000)
    for table, value in (("wav.scp", "{}.flac"), ("text", "WORD"), ("utt2spk", "s")):
        (folder / table).write_text("".join(f"{utt} {value.format(utt)}\n" for utt in ids))
    return tmp_path


def check(corpus, dump="raw", **options):
    check_sets(corpus / "data", corpus / dump, ["train"], **options)
    return corpus / dump / "train"


def test_it_holds_counts_and_digests_whatever_the_number_of_jobs(corpus):
    folder = check(corpus, nj=1)
    facts = read_facts(folder)
    for utt, path in read_table(folder / "wav.scp").items():
        data = read_bytes(path)
        samples = soundfile.info(path).frames
        assert facts[utt] == AudioFacts(samples, len(data), audio_check.digest_of(data))
    assert audio_check.digest_of(b"abc") == "cf4ab791c62b8d2b2109c90275287816"  # printf abc | b2sum -l 128
    for nj in (2, 7):
        other = check(corpus, f"raw{nj}", nj=nj)
        for name in ("manifest.tsv", "wav.scp", "utt2num_samples"):
            assert (other / name).read_bytes() == (folder / name).read_bytes()


def test_an_interrupted_check_goes_on(corpus, monkeypatch, capsys):
    monkeypatch.setattr(check_journal, "SECONDS", 0.0)  # every verdict is worth writing down
    examine, looked_at = audio_check.examine_audio, []
    bad, mended = corpus / "data/train/u03.flac", corpus / "data/train/u05.flac"
    whole = mended.read_bytes()
    bad.write_bytes(bad.read_bytes()[:500])
    mended.write_bytes(whole[:500])

    def examined(path, *args):
        looked_at.append(os.path.basename(path)[:3])
        if len(looked_at) == 30:
            raise KeyboardInterrupt
        return examine(path, *args)

    monkeypatch.setattr(audio_check, "examine_audio", examined)
    with pytest.raises(KeyboardInterrupt):
        check(corpus, policy="skip")
    journal = corpus / ".checking.raw/train.jsonl"
    before, seen = set(looked_at), journal.read_text()
    with journal.open("a") as handle:
        handle.write('{"location": "torn')
    mended.write_bytes(whole)
    looked_at[:] = [""] * 50  # not interrupted again
    folder = check(corpus, policy="skip")
    known = [json.loads(line)["location"] for line in seen.splitlines()[1:] if line]
    again = set(looked_at[50:])
    assert len(known) > 15 and "of 40 recordings were checked by an earlier start" in capsys.readouterr().out
    assert again & before <= {"u05"} | before - {os.path.basename(path)[:3] for path in known}
    assert "u05" in again and "u03" not in again, "what changed is decoded again, what is bad is remembered"
    assert not journal.parent.exists()
    monkeypatch.undo()
    assert (folder / "manifest.tsv").read_bytes() == (
        check(corpus, "raw2", policy="skip") / "manifest.tsv"
    ).read_bytes()
    assert (folder / "rejected.tsv").read_bytes() == (corpus / "raw2/train/rejected.tsv").read_bytes()


def test_a_short_check_leaves_nothing_behind(corpus):
    (corpus / "data/train/u03.flac").unlink()
    with pytest.raises(ValueError, match="1 bad items"):
        check(corpus)
    assert [path.name for path in corpus.iterdir()] == ["data"]


def test_a_journal_of_another_limit_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(check_journal, "SECONDS", 0.0)
    path, fault = tmp_path / "c/train.jsonl", AudioError("/a", "missing", "no such file", "it must exist", "restore it")
    journal = CheckJournal(path, 1040)
    journal.add("/a b é", [5, 6], AudioFacts(1, 2, "d"))
    journal.add("/a", [], fault)
    again = CheckJournal(path, 1040)
    assert again.find("/a b é", [5, 6]) == AudioFacts(1, 2, "d") and again.find("/a b é", [5, 7]) is None
    assert str(again.find("/a", [])) == str(fault)
    assert CheckJournal(path, 400).find("/a b é", [5, 6]) is None and not path.exists()


def test_changed_audio_is_named_and_copied_audio_is_not(corpus):
    folder = check(corpus)
    paths = read_table(folder / "wav.scp")
    assert changed_audio(folder, paths) == ""
    for path in paths.values():
        os.utime(path)  # as a copy of the corpus has it
    assert changed_audio(folder, paths) == "" and len(read_manifest(folder)) == 40
    path = paths["u07"]
    data = bytearray(read_bytes(path))
    data[-1] ^= 1
    for other in paths.values():
        os.utime(other, (0, 0))
    with open(path, "wb") as handle:
        handle.write(data)
    said = changed_audio(folder, paths)
    assert said.startswith(f"{folder}/manifest.tsv is older than the audio: 1 of 40 recordings looked at changed")
    assert f"the first: {path} has other contents; rerun stage 2 (check)" in said
    with pytest.raises(ValueError, match="is older than the audio"):
        read_manifest(folder)
    with open(path, "ab") as handle:
        handle.write(b"more")
    assert f"{path} has {len(data) + 4} bytes, had {len(data)}" in changed_audio(folder, paths)
    os.unlink(path)
    assert f"{path}: No such file or directory" in changed_audio(folder, paths)
    assert changed_audio(folder, paths, at_most=5) == "", "u07 is not among every eighth"
    (folder / "manifest.tsv").unlink()
    assert changed_audio(folder, paths) == "", "what an older version made has none"


def test_a_manifest_that_is_not_whole(corpus):
    folder = check(corpus)
    (folder / "manifest.tsv").write_text((folder / "manifest.tsv").read_text()[:-10])
    with pytest.raises(ValueError, match="not a whole manifest; rerun stage 2"):
        read_facts(folder)


TABLES = {
    "sorted": "a 1\nb 2 3\nc /x y.wav\n",
    "unsorted": "c 3\na 1\nb 2\n",
    "no end of line": "a 1\nb 2",
    "tabs, spaces, empty lines": "  a\t1\n\n   \nb   2 \n\tc 3\n",
    "carriage returns and a mark": "\ufeffa 1\r\nb 2\r\n",
    "other letters": "ä 1\nb ü.wav\nß 3\n",
    "no value": "a\nb 2\n",
    "one": "a 1\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_the_compact_table_reads_as_the_plain_one(name, tmp_path):
    (tmp_path / "t").write_bytes(TABLES[name].encode())
    plain, compact = read_table(tmp_path / "t", allow_empty=True), CompactTable(tmp_path / "t")
    assert dict(compact.items()) == plain and list(compact) == list(plain) and len(compact) == len(plain)
    assert compact.indices(_bytes([*plain, "zz", "0"])).tolist() == [*range(len(plain)), -1, -1]
    for missing in ("zz", "0", "a long name that no id of the table is as long as", ""):
        assert missing not in compact
        with pytest.raises(KeyError, match=f"no line for {missing}"):
            compact[missing]


def _bytes(ids):
    return np.array([utt.encode() for utt in ids], "S")


def test_what_is_no_table(tmp_path):
    path = tmp_path / "t"
    with pytest.raises(FileNotFoundError, match="t: no such table"):
        CompactTable(path)
    for data, words in (
        (b"", "no line in it"),
        (b"\n \n", "no line in it"),
        (b"a 1\nb \xff\n", "not UTF-8"),
        (b"b 1\na 2\nb 3\n", "id 'b' stands there twice"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            CompactTable(path)


def test_lengths(tmp_path):
    path = tmp_path / "utt2num_samples"
    path.write_text("b 160000\na 5,80\n")
    ids, lengths = read_lengths(path)
    assert ids.tolist() == [b"b", b"a"] and lengths.tolist() == [160000, 5]
    for value in ("many", "", "-3", "0", "1.5"):
        path.write_text(f"a 1\nb {value}\n")
        with pytest.raises(ValueError, match=rf"b: '{value}' is not a number of samples; rerun stage 2"):
            read_lengths(path)
