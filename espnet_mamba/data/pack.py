"""Packing a checked set's audio into uncompressed tar shards, so that a file system has few large files to serve.

The bytes of the shards depend on the set and the shards' size only; a killed run goes on with the first shard missing.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from espnet_mamba.data.audio import read_bytes
from espnet_mamba.data.audio_check import digest_of, in_order
from espnet_mamba.data.check_journal import AudioFacts
from espnet_mamba.data.files import atomic_path, write_text
from espnet_mamba.data.kaldi import read_table, write_table
from espnet_mamba.data.manifest import MANIFEST, read_facts
from espnet_mamba.data.tar_shards import Member, parse_member

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers and contents begin at multiples of it


@dataclass(frozen=True)
class Entry:
    """One recording of a shard: where it comes from, its tar header, and where its bytes go."""

    utt_id: str
    source: str
    facts: AudioFacts
    header: bytes
    offset: int


@dataclass(frozen=True)
class Shard:
    """A tar file to be, and ``size``, its bytes."""

    path: Path
    entries: Sequence[Entry]
    size: int

    @property
    def index(self) -> str:
        """What the file beside it says of it."""
        rows = [f"{e.utt_id}\t{e.offset}\t{e.facts.bytes}\t{e.facts.digest}\n" for e in self.entries]
        return "utterance\toffset\tbytes\tblake2b\n" + "".join(rows)

    @property
    def index_path(self) -> Path:
        """``00000.tsv`` of ``00000.tar``."""
        return self.path.with_suffix(".tsv")

    def is_done(self) -> bool:
        """Tell whether it is on the disk, whole: its index is written last."""
        if not (self.path.is_file() and self.index_path.is_file() and self.path.stat().st_size == self.size):
            return False
        return self.index_path.read_text(encoding="utf-8") == self.index


def pack_sets(dump_dir: str, sets: Sequence[str], shard_dir: str, shard_mb: float, nj: int) -> None:
    """Pack each of ``sets`` of ``dump_dir`` into a folder of its own; ``shard_mb`` is in 10^6 bytes."""
    if shard_mb <= 0:
        raise ValueError(f"--shard_mb {shard_mb}: must be above 0")
    for name in sets:
        pack_set(Path(dump_dir) / name, Path(shard_dir) / name, int(shard_mb * 1e6), nj)


def pack_set(folder: str | Path, shard_dir: str | Path, shard_bytes: int, nj: int = 1) -> None:
    """Copy the audio of the checked set ``folder`` to ``shard_dir/NNNNN.tar``; its ``wav.scp`` then points there.

    Args:
        folder: a set that stage 2 has made.
        shard_dir: where the shards go.
        shard_bytes: size of a shard, at most, unless one recording is larger.
        nj: recordings copied at a time; the shards are the same for any number.

    Raises:
        ValueError: audio changed since the check, the disk is too small, or the set lies in these shards already but
            cut in another way.
    """
    folder, shard_dir = Path(folder), Path(shard_dir).resolve()
    sources = read_table(folder / "wav.scp")
    shards = plan_shards(sources, read_facts(folder), shard_dir, shard_bytes)
    places = {e.utt_id: str(Member(str(s.path), e.offset, e.facts.bytes)) for s in shards for e in s.entries}
    missing = [shard for shard in shards if not shard.is_done()]
    if sources == places and not missing:
        print(f"{folder}: its {len(places)} recordings lie in {len(shards)} shards of {shard_dir} already")
        return
    _refuse_circles(folder, sources, shard_dir)
    _refuse_small_disk(shard_dir, sum(shard.size for shard in missing))
    if len(missing) < len(shards):
        print(f"{folder}: {len(shards) - len(missing)} of {len(shards)} shards are there from an earlier start")
    with ThreadPoolExecutor(max(1, nj)) as pool:
        total = sum(len(shard.entries) for shard in missing)
        with tqdm(total=total, desc=f"packing {folder.name}", unit="utt", mininterval=5) as progress:
            for shard in missing:
                _write_shard(shard, pool, max(1, nj), progress)
    write_table(folder / "wav.scp", places)
    os.utime(folder / MANIFEST)  # each copy was compared with it
    size = sum(shard.size for shard in shards) / 1e9
    print(f"{folder}: {len(places)} recordings in {len(shards)} shards of {shard_dir}, {size:.3f} GB")


def plan_shards(
    sources: Mapping[str, str], facts: Mapping[str, AudioFacts], shard_dir: Path, shard_bytes: int
) -> list[Shard]:
    """Decide where every byte will lie: utterances by id, filled up shard by shard. ValueError for unlike tables."""
    odd = sorted(set(sources) ^ set(facts))
    if odd:
        raise ValueError(f"{odd[0]!r} is not in both wav.scp and {MANIFEST}; rerun stage 2 (check)")
    shards: list[Shard] = []
    entries: list[Entry] = []
    place = 0

    def finish() -> None:
        # a tar file ends with two empty blocks
        shards.append(Shard(shard_dir / f"{len(shards):05d}.tar", tuple(entries), place + 2 * BLOCK))

    for utt_id in sorted(sources):
        header = _header(utt_id, sources[utt_id], facts[utt_id].bytes)
        size = len(header) + _padded(facts[utt_id].bytes)
        if entries and place + size + 2 * BLOCK > shard_bytes:
            finish()
            entries, place = [], 0
        entries.append(Entry(utt_id, sources[utt_id], facts[utt_id], header, place + len(header)))
        place += size
    finish()
    return shards


def _header(utt_id: str, source: str, length: int) -> bytes:
    """Return the tar header of a recording, without anything that differs from machine to machine."""
    suffix = "" if parse_member(source) else Path(source).suffix
    info = tarfile.TarInfo(utt_id.replace("/", "_") + suffix)
    info.size = length
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _padded(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def _write_shard(shard: Shard, pool: ThreadPoolExecutor, nj: int, progress: tqdm) -> None:
    with atomic_path(shard.path) as temporary:
        with open(temporary, "wb") as handle:
            for entry, data in zip(shard.entries, in_order(pool, _read, shard.entries, ahead=2 * nj), strict=True):
                handle.write(entry.header)
                handle.write(data)
                handle.write(bytes(_padded(len(data)) - len(data)))
                progress.update()
            handle.write(bytes(2 * BLOCK))
    write_text(shard.index_path, shard.index)


def _read(entry: Entry) -> bytes:
    data = read_bytes(entry.source)
    if digest_of(data) != entry.facts.digest:
        raise ValueError(f"{entry.source}: {entry.utt_id} changed since it was checked; rerun stage 2 (check)")
    return data


def _refuse_circles(folder: Path, sources: Mapping[str, str], shard_dir: Path) -> None:
    """Raise ValueError when a shard would have to be read and written at once."""
    members = (parse_member(source) for source in sources.values())
    if any(member and Path(member.shard).parent == shard_dir for member in members):
        raise ValueError(
            f"{folder}/wav.scp: points into {shard_dir}, which would be written anew; rerun stage 2 (check) to begin "
            "from the files, or give another --shard_dir"
        )


def _refuse_small_disk(shard_dir: Path, needed: int) -> None:
    shard_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(shard_dir).free
    if needed > free:
        raise ValueError(
            f"{shard_dir}: {free / 1e9:.3f} GB free, the shards need {needed / 1e9:.3f} GB; give another --shard_dir"
        )
