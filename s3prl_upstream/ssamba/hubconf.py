"""The functions that S3PRL calls by name; each returns an upstream expert."""

from __future__ import annotations

from typing import Any


def ssamba(
    ckpt: str | None = None,
    model_config: str | None = None,
    refresh: bool = False,
    frames: str = "concat",
    repeat_to: int | None = None,
    **_: Any,
) -> Any:
    """Return the expert for the upstream folder ``ckpt`` (config.json and model.safetensors).

    A frame is a column of patches, 160 ms: its bands side by side (``frames="concat"``, as the published expert) or
    their mean. ``repeat_to=320`` repeats each 8 times, for tools that want 50 Hz. ``model_config`` and ``refresh`` are
    part of S3PRL's call and have no meaning here. Raises ValueError that names the folder when it is not such a folder.
    """
    from s3prl_upstream.ssamba.expert import UpstreamExpert

    return UpstreamExpert(ckpt, frames, repeat_to)


def ssamba_local(ckpt: str, model_config: str | None = None, refresh: bool = False, **options: Any) -> Any:
    """Do the same under a name that S3PRL's convention marks as needing a path."""
    return ssamba(ckpt, model_config, refresh, **options)


def ssamba_mean(ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **_: Any) -> Any:
    """Return the expert whose frames are the mean over bands, D wide instead of 8 D."""
    return ssamba(ckpt, model_config, refresh, frames="mean")


def ssamba_50hz(ckpt: str | None = None, model_config: str | None = None, refresh: bool = False, **_: Any) -> Any:
    """Return the expert whose frames are the mean over bands, each repeated to the 50 Hz of a HuBERT."""
    return ssamba(ckpt, model_config, refresh, frames="mean", repeat_to=320)
