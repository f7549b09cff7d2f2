"""Audio inside uncompressed tar files, read by its place: ``shard.tar:offset:length``, in bytes; nothing is unpacked.

Small files are the wall on NFS and Lustre; a shard is opened once in a process and read by position, so that threads
and forks never share a file position.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections import OrderedDict
from typing import NamedTuple

from espnet_mamba.data.errors import AudioError

HEADER = 512  # bytes of tar's header, right before what a member holds
MAX_OPEN = 128  # shards that a process keeps open
_PLACE = re.compile(r"(.+\.tar):(\d+):(\d+)")
_AGAIN = "pack the set again: python -m espnet_mamba.bin.pack_audio"


class Member(NamedTuple):
    """A stretch of a shard: ``length`` bytes from ``offset``."""

    shard: str
    offset: int
    length: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.offset}:{self.length}"


def parse_member(location: str) -> Member | None:
    """Return what ``shard.tar:offset:length`` means, None for the path of a file."""
    match = _PLACE.fullmatch(location)
    return Member(match[1], int(match[2]), int(match[3])) if match else None


def read_member(member: Member) -> bytes:
    """Return the bytes of a member.

    Raises:
        AudioError: the shard is not there, ends too soon, or has no such member at that place.
    """
    if member.offset < HEADER:
        raise AudioError(str(member), "moved", f"offset {member.offset}", f"{HEADER} or more, behind a header", _AGAIN)
    block = _read(member, member.offset - HEADER, HEADER + member.length)
    if len(block) < HEADER + member.length:
        value = f"the shard ends {HEADER + member.length - len(block)} bytes too soon"
        raise AudioError(str(member), "truncated", value, f"{member.length} bytes", f"copy it again, or {_AGAIN}")
    if not _announces(block[:HEADER], member.length):
        value = f"no member of {member.length} bytes begins there"
        raise AudioError(str(member), "moved", value, "as when wav.scp was written", _AGAIN)
    return block[HEADER:]


def _announces(header: bytes, length: int) -> bool:
    """Tell whether a tar header of a file of ``length`` bytes stands here: a shard written anew has other places."""
    try:
        return header[257:262] == b"ustar" and int(header[124:136].rstrip(b"\0 "), 8) == length
    except ValueError:
        return False


def _read(member: Member, start: int, count: int, again: bool = True) -> bytes:
    """Read at a place; once more through a new handle where the kept one fails, as after a server's restart."""
    try:
        handle = _open(member.shard)
        block = os.pread(handle.fileno(), count, start)
        while len(block) < count and (more := os.pread(handle.fileno(), count - len(block), start + len(block))):
            block += more
        return block
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        limit, remedy = "wav.scp points into it", f"move it back, or {_AGAIN}"
        raise AudioError(str(member), "missing", "no such shard", limit, remedy) from error
    except OSError as error:
        _close(member.shard)
        if again:
            return _read(member, start, count, again=False)
        value = f"cannot be read: {error.strerror or error}"
        raise AudioError(str(member), "unreadable", value, "a readable file", "mend the disk or the mount") from error


_handles: OrderedDict[str, io.FileIO] = OrderedDict()
_lock = threading.Lock()


def _open(shard: str) -> io.FileIO:
    """Return the kept handle of a shard. One put out for another closes when its last reader has let go of it."""
    with _lock:
        handle = _handles.get(shard)
        if handle is None:
            handle = _handles[shard] = io.FileIO(shard)
        _handles.move_to_end(shard)
        if len(_handles) > MAX_OPEN:
            _handles.popitem(last=False)
        return handle


def _close(shard: str) -> None:
    with _lock:
        _handles.pop(shard, None)


def _forget() -> None:
    """Begin a forked process with handles and a lock of its own: another thread may have held the parent's."""
    global _lock
    _lock = threading.Lock()
    _handles.clear()


os.register_at_fork(after_in_child=_forget)
