"""The functions that S3PRL calls by name; each returns an upstream expert."""

from __future__ import annotations

from typing import Any


def mamba_hubert(ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **_: Any) -> Any:
    """Return the expert for the upstream folder ``ckpt`` (config.json and model.safetensors).

    ``model_config`` and ``refresh`` are part of S3PRL's call and have no meaning here: the folder holds the
    configuration, and nothing is downloaded. Raises ValueError that names the folder when it is not such a folder.
    """
    from s3prl_upstream.mamba_hubert.expert import UpstreamExpert

    return UpstreamExpert(ckpt)


def mamba_hubert_local(ckpt: str, model_config: str | None = None, refresh: bool = False, **_: Any) -> Any:
    """Do the same under a name that S3PRL's convention marks as needing a path."""
    return mamba_hubert(ckpt, model_config, refresh)
