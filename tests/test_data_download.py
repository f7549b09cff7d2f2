"""Fetching from a server on this machine that breaks off, has no ranges, or sends something else; and unpacking."""

import errno
import hashlib
import http.server
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple

import pytest
from librispeech_tree import PARTS, make_tree

from espnet_mamba.data import download, librispeech, unpack
from espnet_mamba.data.download import fetch
from espnet_mamba.data.kaldi import read_table

CONTENT = os.urandom(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves ``server.files``; breaks off after each of ``server.cuts`` bytes in turn; keeps each request's Range.

    With ``server.hold``, an Event, the connection stays open in silence until it is set.
    """

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        body = server.files.get(self.path)
        if server.errors or body is None:
            self.send_error(server.errors.pop(0) if server.errors else 404)
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted and server.has_ranges else 0
        if first >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first:][: server.cuts.pop(0)] if server.cuts else body[first:])
        if server.hold:
            server.hold.wait(30)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    one = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    one.files, one.ranges, one.cuts, one.errors, one.has_ranges = {"/a.tar.gz": CONTENT}, [], [], [], True
    one.hold = None
    one.url = f"http://127.0.0.1:{one.server_port}"
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()


def get(server, path, **options):
    fetch(f"{server.url}/a.tar.gz", path, options.pop("md5", MD5), pause=0.0, **options)


def test_an_interrupted_transfer_goes_on_where_it_stopped(server, tmp_path, capsys):
    server.cuts = [100_000, 50_000]
    get(server, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert "goes on at byte 100000" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]
    get(server, tmp_path / "a.tar.gz")  # there: nothing is asked
    assert len(server.ranges) == 3


def test_what_an_earlier_run_left_is_used(server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(CONTENT[:299_000])
    get(server, tmp_path / "a.tar.gz")
    assert server.ranges == ["bytes=299000-"] and (tmp_path / "a.tar.gz").read_bytes() == CONTENT
    (tmp_path / "a.tar.gz").rename(tmp_path / "b.tar.gz.part")  # whole, but killed before it was renamed
    get(server, tmp_path / "b.tar.gz")
    assert (tmp_path / "b.tar.gz").is_file()


def test_kill_9_in_the_middle_then_the_same_again(server, tmp_path, root):
    server.cuts, server.hold = [200_000], threading.Event()
    code = "import sys; from espnet_mamba.data.download import fetch; fetch(*sys.argv[1:])"
    command = [sys.executable, "-c", code, f"{server.url}/a.tar.gz", str(tmp_path / "a.tar.gz"), MD5]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL)
    part = tmp_path / "a.tar.gz.part"
    while child.poll() is None and (not part.is_file() or part.stat().st_size < 100_000):
        time.sleep(0.01)
    assert child.poll() is None
    child.kill()
    child.wait()
    server.hold.set()
    kept = part.stat().st_size
    get(server, tmp_path / "a.tar.gz")
    assert server.ranges == [None, f"bytes={kept}-"] and (tmp_path / "a.tar.gz").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.has_ranges, server.cuts = False, [100_000]
    get(server, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == CONTENT and len(server.ranges) == 2


def test_a_wrong_checksum_is_refused_in_one_line(server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(b"x" * 1000)  # another file's beginning
    with pytest.raises(ValueError, match=rf"a.tar.gz.part: md5 \w+ over 300000 bytes, published is {MD5}; .*run"):
        get(server, tmp_path / "a.tar.gz")
    assert not list(tmp_path.iterdir())  # so that the next run begins anew
    (tmp_path / "a.tar.gz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="a.tar.gz: md5 .* over 4 bytes, published is .*; remove it"):
        get(server, tmp_path / "a.tar.gz")
    assert (tmp_path / "a.tar.gz").read_bytes() == b"mine" and len(server.ranges) == 1


def test_it_gives_up_after_tries_that_bring_nothing_and_keeps_the_rest(server, tmp_path):
    server.cuts = [10, 10, 10, 0, 0, 0]
    with pytest.raises(OSError, match="ended at byte 30 of 300000.*30 bytes are kept in a.tar.gz.part.*--corpus_dir"):
        get(server, tmp_path / "a.tar.gz", attempts=3)
    assert (tmp_path / "a.tar.gz.part").stat().st_size == 30
    server.cuts, server.errors = [], [503, 429]
    get(server, tmp_path / "a.tar.gz", attempts=3)  # a busy server is asked again
    with pytest.raises(OSError, match="404"):
        fetch(f"{server.url}/none.tar.gz", tmp_path / "none.tar.gz", MD5, pause=60)  # one that lacks it is not
    with pytest.raises(OSError, match="refused.*give another --mirror"):
        fetch("http://127.0.0.1:1/a.tar.gz", tmp_path / "none.tar.gz", MD5, attempts=2, pause=0)


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(0, 0, 450_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="a.tar.gz, to fetch and to unpack, needs 0.001 GB.*0.000 GB free") as caught:
        get(server, tmp_path / "a.tar.gz", copies=2)
    assert caught.value.errno == errno.ENOSPC and (tmp_path / "a.tar.gz.part").stat().st_size == 0
    get(server, tmp_path / "a.tar.gz", copies=1)


def test_a_disk_that_fills_on_the_way_is_not_tried_again(server, tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "tqdm", full)
    with pytest.raises(OSError, match="No space left"):
        get(server, tmp_path / "a.tar.gz")
    assert len(server.ranges) == 1


def test_two_processes_do_not_write_one_file(server, tmp_path):
    import fcntl

    with open(tmp_path / "a.tar.gz.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another process is fetching it"):
            get(server, tmp_path / "a.tar.gz")


def pack(path, members):
    """A .tar.gz of (TarInfo, bytes)."""
    with tarfile.open(path, "w:gz") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["../out.flac", "/tmp/out.flac", "a/../../out.flac"])
def test_a_member_that_leads_out_is_refused(name, tmp_path):
    archive = pack(tmp_path / "a.tar.gz", [(tarfile.TarInfo(name), b"x")])
    with pytest.raises(ValueError, match=f"member '{re.escape(name)}' leads out"):
        unpack.unpack(archive, tmp_path / "in/side")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.tar.gz"]


def test_links_are_refused(tmp_path):
    link = tarfile.TarInfo("a/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    with pytest.raises(ValueError, match="'a/link' is a link or device"):
        unpack.unpack(pack(tmp_path / "a.tar.gz", [(link, b""), (tarfile.TarInfo("a/link/x"), b"x")]), tmp_path)
    assert not (tmp_path / "a").exists()


def test_unpacking_goes_on_and_is_done_once(tmp_path, monkeypatch):
    members = [(tarfile.TarInfo(f"a/{i}"), bytes([i]) * 1000) for i in range(5)]
    archive, written = pack(tmp_path / "a.tar.gz", members), []
    write = shutil.copyfileobj

    def copy(source, sink, length):
        if len(written) == 3 and not (tmp_path / "go").exists():
            sink.write(b"half")
            raise KeyboardInterrupt
        written.append(sink.name)
        write(source, sink, length)

    monkeypatch.setattr(shutil, "copyfileobj", copy)
    with pytest.raises(KeyboardInterrupt):
        unpack.unpack(archive, tmp_path)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0", "1", "2"]
    assert not unpack.is_unpacked(archive, tmp_path)
    (tmp_path / "go").touch()
    assert unpack.unpack(archive, tmp_path) == 5 and len(written) == 5
    assert unpack.is_unpacked(archive, tmp_path)
    archive.write_bytes(archive.read_bytes() + b"x")
    assert not unpack.is_unpacked(archive, tmp_path)  # another archive of the same name
    archive.unlink()
    assert unpack.is_unpacked(archive, tmp_path)


def test_a_cut_archive_is_named(tmp_path):
    archive = pack(tmp_path / "a.tar.gz", [(tarfile.TarInfo(f"{i}"), os.urandom(50_000)) for i in range(3)])
    archive.write_bytes(archive.read_bytes()[:80_000])
    with pytest.raises(ValueError, match="a.tar.gz: damaged after 1 files"):
        unpack.unpack(archive, tmp_path)
    assert not unpack.is_unpacked(archive, tmp_path)


def test_from_the_server_to_lists(server, tmp_path, root, monkeypatch):
    tree = make_tree(tmp_path / "made")
    sums = {}
    for part in PARTS:
        with tarfile.open(tmp_path / f"{part}.tar.gz", "w:gz") as archive:
            for folder in (f"LibriSpeech/{part}", "LibriSpeech/SPEAKERS.TXT"):
                archive.add(tree.parent / folder, folder)
        data = (tmp_path / f"{part}.tar.gz").read_bytes()
        number = librispeech.ARCHIVES[part][0]
        server.files[f"/resources/{number}/{part}.tar.gz"] = data
        sums[part] = (number, hashlib.md5(data).hexdigest())
    with pytest.raises(ValueError, match="part 'test-claen': .*did you mean 'test-clean'"):
        librispeech.fetch_parts(["test-claen"], tmp_path / "downloads")
    monkeypatch.setattr(librispeech, "ARCHIVES", sums)
    for _ in range(2):
        found = librispeech.fetch_parts(list(PARTS), tmp_path / "downloads", f"{server.url}/resources/", False)
    assert found == tmp_path / "downloads/LibriSpeech" and len(server.ranges) == 3
    assert not list((tmp_path / "downloads").glob("*.tar.gz"))
    librispeech.prepare(found, tmp_path / "data", {"train": ["train-clean-5"], "dev": ["dev-clean-2"]})
    assert len(read_table(tmp_path / "data/train/text")) == 12


def test_the_command_refuses_an_unknown_part_in_one_line(tmp_path, root):
    command = [sys.executable, "-m", "espnet_mamba.bin.prepare_librispeech", "--mirror", "http://127.0.0.1:1"]
    command += ["--train_parts", "train-clean-5", "--dev_parts", "dev-clean-2", "--test_parts", "nothing"]
    run = {"capture_output": True, "text": True, "cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(root)}}
    result = subprocess.run(command, **run)
    assert result.returncode == 2 and result.stderr.startswith("error: part 'nothing': not in LibriSpeech")
    assert not list(tmp_path.iterdir())
    assert "--alignments_dir" in subprocess.run([*command[:3], "--help"], **run).stdout
