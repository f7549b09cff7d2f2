"""Fetch a published file over HTTP: resumed where it stopped, checked by its md5, in its place only when whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

CHUNK = 1 << 20  # bytes read at a time
TIMEOUT = 60  # seconds without a byte
_INTERRUPTIONS = (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ssl.SSLError)


def fetch(url: str, path: str | Path, md5: str, attempts: int = 5, pause: float = 5.0, copies: int = 1) -> None:
    """Download ``url`` to ``path``; what a broken transfer has brought stays in ``path.part`` and is not fetched again.

    Args:
        url: http or https; a server without ranges is read from the start.
        path: nothing is fetched when it is there with the right md5.
        md5: hexadecimal, as published.
        attempts: tries in a row that may bring nothing; one that brings a byte begins the count again.
        pause: seconds before the second try, doubled for each after it.
        copies: how often the file's size must fit on the disk (2: it will be unpacked beside itself).

    Raises:
        ValueError: the md5 differs. A partial file is then removed, a file that stood there is not.
        OSError: the network, the disk, or another process that fetches the same file; one line with the remedy.
    """
    path = Path(path)
    if path.is_file():
        _require_md5(path, md5, "remove it and run the same command again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "ab") as handle:
        _lock(handle, path)
        _fetch_all(url, handle, path, attempts, pause, copies)
        handle.flush()
        os.fsync(handle.fileno())
        try:
            _require_md5(part, md5, f"{url} sent something else; it was removed, run the same command again")
        except ValueError:
            part.unlink()  # resuming it would only fail again
            raise
        os.replace(part, path)


def md5_of(path: str | Path) -> str:
    """Return the md5 of a file in hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise OSError (ENOSPC) when ``folder``'s disk has less than ``num_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"{what} needs {num_bytes / 1e9:.3f} GB, {folder.absolute()} has {free / 1e9:.3f} GB free"
        raise OSError(errno.ENOSPC, f"{needed}; a larger disk is chosen by --download_dir")


def _require_md5(path: Path, md5: str, remedy: str) -> None:
    found = md5_of(path)
    if found != md5:
        raise ValueError(f"{path}: md5 {found} over {path.stat().st_size} bytes, published is {md5}; {remedy}")


def _lock(handle: BinaryIO, path: Path) -> None:
    """Take the partial file for this process: two that append to it would leave a mixture."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"{path}: another process is fetching it; wait for that one") from error
    except OSError:  # a file system without locks
        pass


def _fetch_all(url: str, handle: BinaryIO, path: Path, attempts: int, pause: float, copies: int) -> None:
    """Receive until the file is whole; wait and go on after an interruption."""
    failures = 0
    while True:
        before = handle.tell()
        try:
            _receive(url, handle, path, copies)
            return
        except _INTERRUPTIONS as error:
            code = getattr(error, "code", 0)
            if code == 416:  # nothing lies behind what is here: it is whole, or longer than the file; the md5 tells
                return
            failures = 1 if handle.tell() > before else failures + 1
            if failures >= attempts or 400 <= code < 500 and code not in (408, 429):
                handle.flush()
                raise OSError(
                    f"{url}: {error or type(error).__name__} (try {failures} without a byte, {handle.tell()} bytes are "
                    f"kept in {path.name}.part); run the same command again, give another --mirror, or bring the "
                    "unpacked corpus and give --corpus_dir"
                ) from error
            wait = pause * 2 ** (failures - 1)
            print(f"{path.name}: {error or type(error).__name__}; goes on at byte {handle.tell()} in {wait:g} s")
            time.sleep(wait)


def _receive(url: str, handle: BinaryIO, path: Path, copies: int) -> None:
    """Append what is missing, in one request, with rate and time to go on stderr."""
    offset = handle.tell()
    headers = {"User-Agent": "espnet-mamba", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if offset and not (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
            offset = 0  # the whole file comes
            handle.seek(0)
            handle.truncate()
        length = response.headers.get("Content-Length")
        total = offset + int(length) if length else None
        if total:
            what = f"{path.name}, " + ("to fetch" if copies == 1 else "to fetch and to unpack,")
            require_space(path.parent, total * copies - offset, what)
        options = {"unit": "B", "unit_scale": True, "mininterval": 5, "desc": path.name}
        with tqdm(total=total, initial=offset, **options) as progress:
            while chunk := response.read1(CHUNK):
                handle.write(chunk)
                progress.update(len(chunk))
    if total and handle.tell() < total:
        raise ConnectionError(f"the connection ended at byte {handle.tell()} of {total}")
