"""Unpack a .tar.gz of recordings: regular files inside the folder only, and again from where it stopped."""

from __future__ import annotations

import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from espnet_mamba.data.files import read_json, write_json


def is_unpacked(archive: str | Path, folder: str | Path) -> bool:
    """Return whether ``unpack`` has finished this archive here, whether or not the archive is still there."""
    archive = Path(archive)
    record = _record(archive, Path(folder))
    if not record.is_file():
        return False
    return not archive.is_file() or read_json(record)["bytes"] == archive.stat().st_size


def unpack(archive: str | Path, folder: str | Path) -> int:
    """Unpack ``archive`` into ``folder``; a file that is there with its size is not written again.

    Each file is written under another name and renamed, so that what bears its own name is whole.

    Returns:
        The number of files in the archive.

    Raises:
        ValueError: a damaged archive; or a member outside the folder, a link or a device, of which nothing is written.
    """
    archive, folder = Path(archive), Path(folder)
    num_files = 0
    options = {"unit": "B", "unit_scale": True, "mininterval": 5, "desc": f"unpacking {archive.name}"}
    with open(archive, "rb") as raw, tqdm(total=archive.stat().st_size, **options) as progress:
        try:
            # As a stream: nothing is read twice, and the position in the archive is how far it is.
            with tarfile.open(fileobj=raw, mode="r|gz") as members:
                for member in members:
                    target = _target(archive, folder, member)
                    if not member.isdir():
                        _write(members, member, target)
                        num_files += 1
                    progress.update(raw.tell() - progress.n)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise ValueError(
                f"{archive}: damaged after {num_files} files ({error}); remove it, fetch it again"
            ) from error
    write_json(_record(archive, folder), {"bytes": archive.stat().st_size, "files": num_files})
    return num_files


def _record(archive: Path, folder: Path) -> Path:
    return folder / f".{archive.name}.unpacked.json"


def _target(archive: Path, folder: Path, member: tarfile.TarInfo) -> Path:
    """Return where a member goes; ValueError for one that must not be written."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"{archive}: member {member.name!r} leads out of {folder}; this is not the published archive")
    if not (member.isfile() or member.isdir()):
        raise ValueError(f"{archive}: member {member.name!r} is a link or device; this is not the published archive")
    return folder / name


def _write(members: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    if target.is_file() and target.stat().st_size == member.size:
        return
    source = members.extractfile(member)
    assert source is not None  # a regular file, as _target has seen
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    try:
        # Not synced to the disk one by one: of 280 000 small files that would be most of the time, and the archive
        # stays until all are there.
        with open(temporary, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
