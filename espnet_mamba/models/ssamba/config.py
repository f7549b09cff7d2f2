"""SSAMBA as data: one frozen dataclass, read from and written to YAML and JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from espnet_mamba.names import nearest

KIND = "ssamba"  # the key `kind` of a model's YAML, by which it is told from a HuBERT's
CHOICES = {
    "kind": (KIND,),
    "residual": ("doubled", "single"),
    "join": ("mean", "sum"),
    "final_norm": ("once", "twice"),
    "position_cut": ("start", "centre"),
    "dt_bias_backward": ("mamba", "zero"),
}
COUNTS = "embed_dim depth state_size conv_kernel expand num_mel_bins num_frames mask_patches".split()


@dataclass(frozen=True)
class SsambaConfig:
    """Every choice that shapes an SSAMBA model and its masks. Defaults: SSAMBA Base as its authors trained it."""

    kind: str = KIND
    name: str = "ssamba_base"
    embed_dim: int = 768  # D
    depth: int = 24  # blocks; two of them, one per direction, are a pair
    state_size: int = 16  # N
    conv_kernel: int = 4  # tokens of the mixer's causal convolution
    expand: int = 2  # E / D
    share_conv: bool = False  # one convolution for both directions inside a mixer; the published model has two
    join: str = "mean"  # how the two directions inside a mixer meet: mean (published) or sum
    num_mel_bins: int = 128
    num_frames: int = 1024  # of 10 ms that the learned positions cover; longer utterances interpolate them
    patch_size: tuple[int, int] = (16, 16)  # (mel bins, frames), without overlap
    residual: str = "doubled"  # doubled: both directions' streams are added too, as published; single: one stream
    final_norm: str = "once"  # twice: the published pretraining normalises what its heads read a second time
    position_cut: str = "start"  # which positions a shorter utterance has: the first ones, or the middle (published)
    dt_bias_backward: str = "mamba"  # zero: the published code resets the inner backward step sizes to 0.693
    drop_path: float = 0.1  # of the last block's output; rises linearly from 0
    mask_patches: int = 300  # masked of num_patches; other lengths mask the same fraction. Published: 250, 300, 400
    mask_squares: tuple[int, int] = (3, 5)  # least and greatest side of a masked square, in patches
    mask_passes: int = 2  # 2: each loss has a mask and a pass of its own (published); 1: both share one
    reconstruction_weight: float = 10.0  # of the mean squared error beside InfoNCE

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "mask_squares", tuple(self.mask_squares))
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{self.name}: {key}: {getattr(self, key)!r} is not one of: {' '.join(known)}")
        for key in COUNTS:
            if getattr(self, key) < 1:
                raise ValueError(f"{self.name}: {key} is {getattr(self, key)}, expected at least 1")
        if self.depth % 2:
            raise ValueError(f"{self.name}: depth is {self.depth}, expected an even number: blocks work in pairs")
        for key, size in (("num_mel_bins", self.patch_size[0]), ("num_frames", self.patch_size[1])):
            if getattr(self, key) % size:
                raise ValueError(f"{self.name}: {key} is {getattr(self, key)}, expected whole patches of {size}")
        if self.mask_patches > self.num_patches:
            raise ValueError(f"{self.name}: mask_patches is {self.mask_patches} of only {self.num_patches} patches")
        if not 1 <= self.mask_squares[0] <= self.mask_squares[-1] or len(self.mask_squares) != 2:
            raise ValueError(f"{self.name}: mask_squares is {list(self.mask_squares)}, expected [least, greatest] side")
        if self.mask_passes not in (1, 2):
            raise ValueError(f"{self.name}: mask_passes is {self.mask_passes}, expected 1 or 2")

    @property
    def num_bands(self) -> int:
        """Rows of patches: 8 for every published model."""
        return self.num_mel_bins // self.patch_size[0]

    @property
    def num_positions(self) -> int:
        """Columns of patches with a position of their own: 64 for every published model."""
        return self.num_frames // self.patch_size[1]

    @property
    def num_patches(self) -> int:
        """Patches of ``num_frames`` frames: 512 for every published model."""
        return self.num_bands * self.num_positions

    @property
    def patch_pixels(self) -> int:
        """Values in a patch: 256 for every published model."""
        return self.patch_size[0] * self.patch_size[1]

    @property
    def downsample_rate(self) -> int:
        """Samples at 16 kHz from one column of patches to the next: 2560 for every published model."""
        return 160 * self.patch_size[1]

    def mixer_options(self) -> dict[str, Any]:
        """Return the keyword arguments of this config's mixers."""
        keys = ("state_size", "conv_kernel", "expand", "share_conv", "join")
        return {key: getattr(self, key) for key in keys}


def config_from_dict(values: dict[str, Any], source: str) -> SsambaConfig:
    """Build a config; ValueError names ``source``, the unknown key and the nearest known one."""
    known = [field.name for field in fields(SsambaConfig)]
    for key in values:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near!r}?" if near else f"; known: {' '.join(known)}"
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    return SsambaConfig(**values)


def config_to_dict(config: SsambaConfig) -> dict[str, Any]:
    """Return plain values that YAML and JSON can hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def load_config(path: str | Path) -> SsambaConfig:
    """Read a model's YAML.

    Raises:
        FileNotFoundError: there is no such model; the message names the nearest one in the folder.
        ValueError: an unknown key, a value that cannot be, or the YAML of another kind of model.
    """
    path = Path(path)
    if not path.is_file():
        models = sorted(p.stem for p in path.parent.glob("*.yaml"))
        near = nearest(path.stem, models)
        hint = f"did you mean {near!r}? " if near else ""
        raise FileNotFoundError(f"model {path.stem!r}: no file {path}; {hint}known: {' '.join(models)}")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if values.get("kind") != KIND:
        raise ValueError(f"{path}: not an SSAMBA model: it lacks the line 'kind: {KIND}'")
    return config_from_dict({"name": path.stem} | values, str(path))
