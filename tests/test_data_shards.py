"""Audio in tar shards: the same samples, the same bytes at any number of jobs, and every way a shard can be wrong."""

import hashlib
import os
import shutil
import subprocess
import tarfile
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from espnet_mamba.data import pack, tar_shards
from espnet_mamba.data.audio import AudioError, read_audio
from espnet_mamba.data.audio_list import AudioList
from espnet_mamba.data.check import check_sets
from espnet_mamba.data.kaldi import read_table
from espnet_mamba.data.manifest import changed_audio, read_facts, read_manifest
from espnet_mamba.data.pack import pack_set
from espnet_mamba.data.tar_shards import Member, parse_member

NAMES = {"u1": "a.wav", "u2": "b c é.flac", "u3": "c.ogg", "u4": "d.wav", "u5": "e.flac"}


def write_corpus(folder, names=NAMES):
    """Write a set of noise of several formats and lengths, checked as stage 2 does."""
    rng = np.random.default_rng(0)
    raw = folder / "data/train"
    raw.mkdir(parents=True)
    for number, name in enumerate(names.values()):
        soundfile.write(raw / name, rng.normal(0, 0.1, 2000 + 700 * number), 16000)
    for table, value in (("text", "WORD"), ("utt2spk", "s")):
        (raw / table).write_text("".join(f"{utt} {value}\n" for utt in names))
    (raw / "wav.scp").write_text("".join(f"{utt} {name}\n" for utt, name in names.items()))
    check_sets(folder / "data", folder / "dump/raw", ["train"])
    return folder / "dump/raw/train"


@pytest.fixture
def dump(tmp_path):
    return write_corpus(tmp_path)


def shards_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_location_is_a_path_unless_it_says_where_in_a_shard():
    assert parse_member("/a b/0.tar:512:31415") == Member("/a b/0.tar", 512, 31415)
    assert str(parse_member("/a b/0.tar:512:31415")) == "/a b/0.tar:512:31415"
    for path in ("/a/b.flac", "/a/0.tar", "/a/12:30.flac", "0.tar:512", "0.tar:-1:5", "a.ark:5:6"):
        assert parse_member(path) is None


def test_samples_are_those_of_the_files(dump, tmp_path):
    before = {utt: read_audio(path) for utt, path in read_table(dump / "wav.scp").items()}
    pack_set(dump, tmp_path / "shards", shard_bytes=10_000)
    packed = AudioList(dump / "wav.scp")
    assert len(list((tmp_path / "shards").glob("*.tar"))) > 1, "more than one shard is tested"
    assert list(packed) == list(NAMES) and all(".tar:" in packed.locations[utt] for utt in packed)
    for utt, samples in before.items():
        assert np.array_equal(packed[utt], samples) and packed[utt].dtype == np.float32
    assert [utterance.num_samples for utterance in read_manifest(dump)] == [len(samples) for samples in before.values()]


def test_tar_unpacks_what_went_in(dump, tmp_path):
    sources = read_table(dump / "wav.scp")
    pack_set(dump, tmp_path / "shards", 10_000)
    found = {}
    for path in sorted((tmp_path / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    assert found == {utt + os.path.splitext(path)[1]: open(path, "rb").read() for utt, path in sources.items()}


def test_bytes_do_not_depend_on_jobs_place_or_time(dump, tmp_path):
    folders = []
    manifest = (dump / "manifest.tsv").read_bytes()
    for nj in (1, 3):
        for path in read_table(dump / "wav.scp").values():
            os.utime(path, (nj, nj))
        check_sets(tmp_path / "data", tmp_path / f"dump{nj}", ["train"], nj=nj)
        pack_set(tmp_path / f"dump{nj}/train", tmp_path / f"shards{nj}", 10_000, nj)
        folders.append(shards_of(tmp_path / f"shards{nj}"))
        assert (tmp_path / f"dump{nj}/train/manifest.tsv").read_bytes() == manifest
    assert folders[0] == folders[1] and len(folders[0]) > 4


def test_names_longer_than_a_tar_header(tmp_path):
    dump = write_corpus(tmp_path, {"u" * 150: "a.wav", "ü" * 90: "b.wav"})
    before = [read_audio(path) for path in read_table(dump / "wav.scp").values()]
    pack_set(dump, tmp_path / "shards", 10**6)
    after = [read_audio(place) for place in read_table(dump / "wav.scp").values()]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with tarfile.open(tmp_path / "shards/00000.tar") as tar:
        assert tar.getnames() == ["u" * 150 + ".wav", "ü" * 90 + ".wav"]


def test_killed_while_packing_goes_on_with_the_shard_it_was_at(dump, tmp_path, monkeypatch, capsys):
    shutil.copytree(dump, tmp_path / "copy")
    write = pack._write_shard
    written = []

    def die_at_the_second(shard, *args):
        if written:
            raise KeyboardInterrupt
        written.append(shard.path.name)
        write(shard, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_write_shard", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            pack_set(dump, tmp_path / "shards", 10_000)
    assert not any(".tar:" in place for place in read_table(dump / "wav.scp").values()), "wav.scp changes last"
    first = (tmp_path / "shards/00000.tar").stat()
    pack_set(dump, tmp_path / "shards", 10_000)
    assert "1 of 5 shards are there from an earlier start" in capsys.readouterr().out
    assert (tmp_path / "shards/00000.tar").stat().st_mtime_ns == first.st_mtime_ns
    again = shards_of(tmp_path / "shards")
    pack_set(dump, tmp_path / "shards", 10_000)
    assert "already" in capsys.readouterr().out
    pack_set(tmp_path / "copy", tmp_path / "whole", 10_000)
    assert shards_of(tmp_path / "whole") == again


def test_what_cannot_be_packed(dump, tmp_path, monkeypatch):
    path = read_table(dump / "wav.scp")["u2"]
    whole = open(path, "rb").read()
    soundfile.write(path, np.random.default_rng(1).normal(0, 0.1, 2700), 16000)
    with pytest.raises(ValueError, match=r"b c é.flac: u2 changed since it was checked; rerun stage 2"):
        pack_set(dump, tmp_path / "shards", 10_000)
    open(path, "wb").write(whole)
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"0.000 GB free, the shards need"):
        pack_set(dump, tmp_path / "none", 10_000)
    monkeypatch.undo()
    pack_set(dump, tmp_path / "shards", 10_000)
    with pytest.raises(ValueError, match="would be written anew; rerun stage 2"):
        pack_set(dump, tmp_path / "shards", 30_000)
    pack_set(dump, tmp_path / "larger", 10**6)  # from shards to shards
    assert np.array_equal(read_audio(read_table(dump / "wav.scp")["u2"]), read_audio(path))
    (dump / "manifest.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.tsv: not there; it is made by stage 2"):
        pack_set(dump, tmp_path / "again", 10**6)


def test_a_damaged_or_moved_shard_is_named(dump, tmp_path):
    pack_set(dump, tmp_path / "shards", 10**6)
    shard = tmp_path / "shards/00000.tar"
    whole, places = shard.read_bytes(), read_table(dump / "wav.scp")
    member = parse_member(places["u2"])

    def fault(place=places["u2"]):
        tar_shards._forget()
        with pytest.raises(AudioError) as raised:
            read_audio(place)
        assert str(shard) in str(raised.value) and raised.value.remedy
        return raised.value.reason, raised.value.value

    shard.write_bytes(whole[: member.offset + 100])
    assert fault() == ("truncated", f"the shard ends {member.length - 100} bytes too soon")
    shard.write_bytes(whole[:512] + whole)
    assert fault()[0] == "moved"
    shard.write_bytes(whole[: member.offset] + bytes(member.length) + whole[member.offset + member.length :])
    assert fault()[0] == "unreadable"
    shard.write_bytes(whole)
    for wrong in (member._replace(offset=member.offset + 512), member._replace(length=member.length - 1)):
        assert fault(str(wrong)) == ("moved", f"no member of {wrong.length} bytes begins there")
    assert fault(str(member._replace(offset=0)))[0] == "moved"
    shard.rename(tmp_path / "moved.tar")
    assert fault() == ("missing", "no such shard")
    assert "rerun stage 2" in changed_audio(dump, places)


def test_a_handle_that_went_stale_is_opened_anew(dump, tmp_path, monkeypatch):
    pack_set(dump, tmp_path / "shards", 10**6)
    place, pread = read_table(dump / "wav.scp")["u1"], os.pread
    before, failures = read_audio(place), [OSError(116, "Stale file handle")]

    def flaky(*args):
        if failures:
            raise failures.pop()
        return pread(*args)

    monkeypatch.setattr(tar_shards.os, "pread", flaky)
    assert np.array_equal(read_audio(place), before) and not failures
    failures += [OSError(5, "Input/output error")] * 2
    with pytest.raises(AudioError, match="cannot be read: Input/output error"):
        read_audio(place)


def test_few_handles_many_shards_threads_and_forks(dump, tmp_path, monkeypatch):
    pack_set(dump, tmp_path / "shards", 1)  # one recording each
    monkeypatch.setattr(tar_shards, "MAX_OPEN", 2)
    tar_shards._forget()
    places = read_table(dump / "wav.scp")
    expected = {utt: hashlib.sha256(read_audio(place)).digest() for utt, place in places.items()}
    wrong = []

    def read_all(seed):
        for utt in np.random.default_rng(seed).permutation(sorted(places)).tolist() * 20:
            if hashlib.sha256(read_audio(places[utt])).digest() != expected[utt]:
                wrong.append(utt)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tar_shards._lock.acquire()  # as another thread may have it while this one forks
    child = os.fork()
    if child == 0:
        status = 1
        try:
            read_all(9)
            status = len(wrong) > 0
        finally:
            os._exit(status)
    tar_shards._lock.release()
    assert os.waitpid(child, 0)[1] == 0 and not wrong and len(tar_shards._handles) <= 2


def test_raw_lists_may_point_into_shards_already(dump, tmp_path):
    """A corpus that comes in shards goes through stage 2 like files, relative to its list."""
    pack_set(dump, tmp_path / "shards", 10_000)
    raw, facts = tmp_path / "data/train", read_facts(dump)
    lines = (f"{utt} ../../shards/{place.rpartition('/')[2]}\n" for utt, place in read_table(dump / "wav.scp").items())
    (raw / "wav.scp").write_text("".join(lines))
    check_sets(tmp_path / "data", tmp_path / "dump2/raw", ["train"])
    assert read_facts(tmp_path / "dump2/raw/train") == facts
    (tmp_path / "shards/00001.tar").unlink()
    tar_shards._forget()  # a kept handle reads on
    with pytest.raises(ValueError, match="bad items"):
        check_sets(tmp_path / "data", tmp_path / "dump2/raw", ["train"])


def test_the_command(dump, tmp_path, root):
    import sys

    command = [sys.executable, "-m", "espnet_mamba.bin.pack_audio", "--dump_dir", str(dump.parent), "--sets", "train"]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([*command, "--shard_dir", str(tmp_path / "s")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "5 recordings in 1 shards" in done.stdout and (tmp_path / "s/train/00000.tar").is_file()
    done = subprocess.run([*command, "--shard_mb", "0"], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: --shard_mb 0.0: must be above 0\n"
