"""Checkpoints: whole or not there, the last two kept, and no byte of one lost without a word."""

import errno
import json
import logging
import os
import subprocess

import numpy as np
import pytest
import torch

from espnet_mamba.train import checkpoint, persistence
from espnet_mamba.train.checkpoint import DamagedCheckpointError, full_disk_is_said, read_state, write_state
from espnet_mamba.train.persistence import CheckpointFolder, drop_rows_beyond


class Killed(BaseException):
    """Ends a save where a kill would: nothing catches it, nothing is tidied up."""


def state(step, floats=500):
    return {"step": step, "model": {"weight": torch.full((floats,), float(step))}}


def keeper(path):
    return CheckpointFolder(path, rank=0, distributed=False)


def saved(path, *steps):
    folder = keeper(path)
    for step in steps:
        folder.save(state(step))
    return folder


def test_the_last_two_are_kept_and_torch_reads_them(tmp_path):
    saved(tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.previous.pth", "checkpoint.pth"]
    assert read_state(tmp_path / "checkpoint.previous.pth")["step"] == 2
    assert torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model"]["weight"][0] == 3
    path, found = keeper(tmp_path).load()
    assert path.name == "checkpoint.pth" and found["step"] == 3
    assert keeper(tmp_path / "none").load() is None


def damages(size):
    """Yield 25 ways to harm ``size`` bytes: 12 lengths to cut to, 13 bits to flip, at the borders and at random."""
    rng = np.random.default_rng(0)
    footer = size - checkpoint.FOOTER_BYTES
    cuts = [0, 1, footer - 1, footer, footer + 1, size - 1, *rng.integers(2, footer - 1, 6)]
    flips = [0, footer - 1, footer, footer + 5, size - 2, size - 1, *rng.integers(1, footer - 1, 7)]
    for length in cuts:
        yield f"cut to {length}", lambda data, n=length: data[:n]
    for place in flips:
        bit = 1 << int(rng.integers(8))
        yield f"bit of {place}", lambda data, i=place, bit=bit: data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :]


def test_no_damage_loads_silently(tmp_path, caplog):
    saved(tmp_path, 7, 8)
    whole = (tmp_path / "checkpoint.pth").read_bytes()
    tried = list(damages(len(whole)))
    assert len(tried) == 25
    for name, harm in tried:
        harmed = harm(whole)
        assert harmed != whole, name
        alone = tmp_path / "alone"
        alone.mkdir(exist_ok=True)
        (alone / "checkpoint.pth").write_bytes(harmed)
        with pytest.raises(ValueError, match="not a checkpoint of this trainer.*delete it to start anew"):
            keeper(alone).load()
        (tmp_path / "checkpoint.pth").write_bytes(harmed)
        caplog.clear()
        path, found = keeper(tmp_path).load()
        assert (path.name, found["step"]) == ("checkpoint.previous.pth", 7), name
        assert f"{tmp_path}/checkpoint.pth: damaged" in caplog.text, "names the damaged one"
        assert f"the previous one, {path}, of step 7" in caplog.text, "and the one used"


def test_a_damaged_one_never_takes_the_place_of_the_good_one(tmp_path):
    saved(tmp_path, 7, 8)
    (tmp_path / "checkpoint.pth").write_bytes(b"torn")
    folder = keeper(tmp_path)
    folder.load()
    folder.save(state(9))
    assert read_state(folder.path)["step"] == 9 and read_state(folder.previous)["step"] == 7
    assert (tmp_path / "checkpoint.damaged.pth").read_bytes() == b"torn"


def test_both_damaged_is_an_error(tmp_path):
    saved(tmp_path, 7, 8)
    for name in ("checkpoint.pth", "checkpoint.previous.pth"):
        (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"checkpoint.pth: damaged.*checkpoint.previous.pth: damaged.*start anew"):
        keeper(tmp_path).load()


def count_down(monkeypatch, events):
    """Let ``events`` writes, syncs and renames of a save happen, then die in the middle of the next."""
    left = [events]

    def watched(original):
        def call(*args):
            left[0] -= 1
            if left[0] < 0:
                if args and isinstance(args[0], bytes | memoryview):  # a write that is cut in two
                    original(args[0][: len(args[0]) // 2])
                raise Killed
            return original(*args)

        return call

    class Handle:
        def __init__(self, handle):
            self.handle = handle
            self.write, self.flush = watched(handle.write), handle.flush

    hashing = checkpoint._Hashing
    monkeypatch.setattr(checkpoint, "_Hashing", lambda handle: hashing(Handle(handle)))
    monkeypatch.setattr(os, "fsync", watched(os.fsync))
    monkeypatch.setattr(os, "replace", watched(os.replace))


def test_killed_at_every_point_of_a_save(tmp_path, monkeypatch):
    """Whatever point a save reaches, a run goes on from the new state or the one before, and can save again."""
    outcomes = []
    for events in range(100):
        path = tmp_path / str(events)
        folder = saved(path, 1, 2)
        with monkeypatch.context() as patch:
            count_down(patch, events)
            try:
                folder.save(state(3))
                finished = True
            except Killed:
                finished = False
        again = keeper(path)
        again.sweep()
        found = again.load()[1]["step"]
        outcomes.append((found, finished))
        again.save(state(found + 1))
        assert keeper(path).load()[1]["step"] == found + 1
        assert not list(path.glob(".*"))
        if finished:
            break
    steps = [found for found, _ in outcomes]
    assert outcomes[-1] == (3, True) and steps == sorted(steps) and set(steps) == {2, 3}
    assert len(steps) > 10, "writes, two syncs and two renames were each a point to die at"


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1, 2)
    hashing, room = checkpoint._Hashing, [1000]

    class Full:
        def write(self, block):
            room[0] -= len(block)
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(block)

    monkeypatch.setattr(checkpoint, "_Hashing", lambda _handle: hashing(Full()))
    with pytest.raises(
        OSError, match=r"checkpoint.pth: no space left .*\d MB free.*checkpoint of step 2 stands"
    ) as full:
        folder.save(state(3))
    assert full.value.errno == errno.ENOSPC, "to which every command adds the remedy"
    monkeypatch.undo()
    assert not list(tmp_path.glob(".*")), "what was written of it is gone"
    assert keeper(tmp_path).load()[1]["step"] == 2
    folder.save(state(3))
    assert keeper(tmp_path).load()[1]["step"] == 3


def test_a_disk_that_is_full_in_fact(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk needs root")
    try:
        folder = saved(disk, 1, 2)
        with pytest.raises(OSError, match=r"no space left .*0.0 MB free.*step 2 stands"):
            folder.save(state(3, floats=20_000))
        assert keeper(disk).load()[1]["step"] == 2
        with pytest.raises(OSError, match="model: no space left"), full_disk_is_said(disk / "model", "x stands"):
            from safetensors.torch import save_file

            save_file(state(3, floats=20_000)["model"], disk / "model")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ValueError, match="^mistake$"), full_disk_is_said(tmp_path / "x", "y"):
        raise ValueError("mistake")
    with pytest.raises(DamagedCheckpointError, match="x.pth: damaged, or not a checkpoint"):
        torch.save({"step": 1}, tmp_path / "x.pth")  # whole, but nobody vouches for it
        read_state(tmp_path / "x.pth")
    (tmp_path / "no").mkdir()
    with pytest.raises(IsADirectoryError):
        write_state(tmp_path / "no", state(1))


def test_resume_false_cannot_fall_back_to_the_old_run(tmp_path, caplog):
    saved(tmp_path, 7, 8)
    folder = keeper(tmp_path)
    folder.set_aside()
    assert folder.load() is None and read_state(tmp_path / persistence.OLD)["step"] == 8
    assert "checkpoint.old.pth" in caplog.text


def test_unfinished_things_are_swept(tmp_path):
    for name in (".last.123", ".valid.loss.best.9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".checkpoint.writing").write_bytes(b"half")
    (tmp_path / ".other.1").mkdir()
    CheckpointFolder(tmp_path, rank=1, distributed=False).sweep("last", "valid.loss.best")
    assert len(list(tmp_path.glob(".*"))) == 4, "the first process alone tidies up"
    keeper(tmp_path).sweep("last", "valid.loss.best")
    assert [path.name for path in tmp_path.glob(".*")] == [".other.1"]


def test_rows_beyond_a_checkpoint_are_dropped(tmp_path, caplog):
    log = tmp_path / "log.jsonl"
    rows = [{"step": 1, "split": "train"}, {"step": 2, "split": "train"}, {"step": 2, "split": "valid"}, {"step": 3}]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "sp'
    for step, validated, kept in ((2, True, 3), (2, False, 2), (9, True, 4), (0, True, 0)):
        log.write_text(text)
        drop_rows_beyond(log, step, validated)
        assert [json.loads(line) for line in log.read_text().splitlines()] == rows[:kept]
    drop_rows_beyond(tmp_path / "none", 1)
    assert not caplog.records or caplog.records[0].levelno < logging.ERROR
