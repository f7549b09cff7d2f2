"""Which part of a corpus is whose, and what the results of a part hang on, as digests."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from espnet_mamba.data.manifest import Utterance

Item = TypeVar("Item")
FORMAT = 1  # of what is computed: a higher one redoes what was done before


class Shard(NamedTuple):
    """Number ``number`` (from 1) of ``count``."""

    number: int
    count: int

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this shard's items: dealt one by one, so that shards of a list sorted by length are equally long."""
        return items[self.number - 1 :: self.count]

    @property
    def tag(self) -> str:
        """How the shard is named in file names."""
        return f"{self.number}of{self.count}"


def parse_shard(text: str) -> Shard:
    """Read ``3/7``.

    Raises:
        ValueError: it is not a number, a slash and a number, or not one of them.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard {text}: not one of 1/n to n/n, e.g. 3/7")
    return Shard(int(match[1]), int(match[2]))


def digest_of(*parts: Any) -> str:
    """Return a digest of values that are told apart by their text."""
    return hashlib.blake2b(repr((FORMAT, *parts)).encode(), digest_size=16).hexdigest()


def digest_of_bytes(blocks: Iterable[bytes]) -> str:
    """Return a digest of blocks of bytes, as if they were one."""
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def digest_of_utterances(utterances: Iterable[Utterance]) -> str:
    """Return a digest of ids, paths and lengths; audio itself is not read."""
    return digest_of_bytes(f"{one.utt_id}\t{one.path}\t{one.num_samples}\n".encode() for one in utterances)


def digest_of_source(spec: str) -> str:
    """Return the digest of a model folder's config and weights, or the name itself of spectral features."""
    folder = Path(spec)
    if not folder.is_dir():
        return spec
    files = [path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".safetensors")]
    return digest_of([(path.name, digest_of_bytes(_blocks(path))) for path in files])


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            yield block
