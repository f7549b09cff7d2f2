"""What S3PRL 0.4.18 expects of its dependencies and newer versions of them no longer have."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any


def before_s3prl() -> None:
    """Give torchaudio >= 2.9 the two names that S3PRL touches while it is imported; nothing on older ones."""
    import torchaudio

    if not hasattr(torchaudio, "set_audio_backend"):
        torchaudio.set_audio_backend = _set_audio_backend
    if not hasattr(torchaudio, "sox_effects"):
        stub = ModuleType("torchaudio.sox_effects", "S3PRL imports it; no task of ours uses it.")
        stub.apply_effects_tensor = stub.apply_effects_file = _no_sox
        torchaudio.sox_effects = sys.modules["torchaudio.sox_effects"] = stub


def before_problems() -> None:
    """Give pandas >= 2 the ``iteritems`` by which S3PRL's corpus readers walk a column."""
    import pandas

    before_s3prl()
    if not hasattr(pandas.Series, "iteritems"):
        pandas.Series.iteritems = pandas.Series.items


def read_shards() -> None:
    """Let S3PRL's data sets read audio in tar shards, ``shard.tar:offset:length``, as everything else here does."""
    from s3prl.dataio.dataset import load_audio

    if not isinstance(load_audio.librosa, _ShardReader):
        load_audio.librosa = _ShardReader(load_audio.librosa)


class _ShardReader:
    """``librosa`` as S3PRL calls it, which is ``load`` alone."""

    def __init__(self, librosa: ModuleType) -> None:
        self.librosa = librosa

    def load(self, path: str, **options: Any) -> Any:
        """Load a path as librosa does, or what lies at a place in a shard."""
        from espnet_mamba.data.audio import read_bytes
        from espnet_mamba.data.tar_shards import parse_member

        return self.librosa.load(io.BytesIO(read_bytes(path)) if parse_member(str(path)) else path, **options)


def _set_audio_backend(backend: str | None) -> None:
    """Accept and ignore the choice of a backend: torchaudio no longer has several."""


def _no_sox(*_args: object, **_options: object) -> None:
    raise ValueError("sox effects are gone from this torchaudio; leave sox_effects out of the configuration")
