"""Frame features of any S3PRL upstream, and one grid of frames for models of any frame rate.

B utterances, S samples at 16 kHz, T frames, D_l width of layer l.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import s3prl_upstream  # noqa: F401 - registers mamba_hubert
from espnet_mamba.names import nearest
from espnet_mamba.targets.features import CONV
from s3prl_upstream.rng import rng_preserved

PREFIX = "s3prl:"
GRID = 320  # samples from frame to frame of the front end, of log-mel and of frame labels
WINDOW = 400  # samples that a frame of the grid sees
FRONT_ENDS = {"front_end": 2, "feature_extractor": 1}  # what models call their convolutions, and the axis of channels

OneByOne = Callable[[Tensor], list[Tensor]]


class S3prlSource:
    """All hidden states of an upstream that S3PRL knows by name; a ``FeatureSource`` of the targets room."""

    def __init__(
        self,
        name: str,
        path_or_url: str | None = None,
        device: str = "cpu",
        grid: int | None = GRID,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Open ``name``, with ``path_or_url`` for those that need one; ``options`` are the upstream's own.

        Frames are brought to one per ``grid`` samples, see :func:`to_grid`; None keeps the upstream's own rate and
        S3PRL's count of valid frames, ``ceil(S / rate)``, of which the last ones may repeat.

        Raises:
            ValueError: a name that S3PRL does not have, an upstream that cannot be built (such as one that would have
                to be downloaded first), layers of different rates without a grid.
        """
        self.upstream = _build(name, path_or_url, options).to(device).eval().requires_grad_(False)
        self.rates = list(self.upstream.downsample_rates)
        if grid is None and len(set(self.rates)) > 1:
            raise ValueError(f"{name}: its layers have frames per {sorted(set(self.rates))} samples; give a grid")
        self.device, self.grid = device, grid
        self.hop = grid or self.rates[0]
        self.dims = list(self.upstream.hidden_sizes)
        self.names = [name] if len(self.dims) == 1 else [f"layer{i}" for i in range(len(self.dims))]
        self._front_end: tuple[nn.Module, int] | None = None

    def add_conv(self) -> bool:
        """See ``espnet_mamba.targets.features.add_conv``: for wav2vec 2.0, HuBERT and their kin, ours among them."""
        if CONV in self.names:
            return True
        modules = list(self.upstream.named_modules())
        found = [
            (module, axis) for name, module in modules for end, axis in FRONT_ENDS.items() if name.endswith(f".{end}")
        ]
        if len(found) != 1 or len(set(self.rates)) > 1:
            return False
        self._front_end = found[0]
        self.names, self.rates = [*self.names, CONV], [*self.rates, self.rates[0]]
        self.dims = [*self.dims, self._layers(torch.zeros(16000))[-1].shape[1]]
        return True

    @torch.no_grad()
    def __call__(self, wavs: Tensor, num_samples: Tensor) -> tuple[list[Tensor], Tensor]:
        """Map ``wavs (B, S)``, ``num_samples (B,)`` to layers ``(B, T, D_l)`` and frame counts ``(B,)``."""
        return one_by_one(self._layers, wavs, num_samples, self.rates, self.grid)

    def _layers(self, wav: Tensor) -> list[Tensor]:
        """Return the valid frames of one waveform (S,): per layer (T_l, D_l)."""
        with _outputs(self._front_end) as conv:
            layers, lengths = self.upstream(wav[None].to(self.device), torch.tensor([len(wav)], device=self.device))
        found = [layer[0, : int(length)].cpu() for layer, length in zip(layers, lengths, strict=True)]
        return found + [frames[0].cpu() for frames in conv]


@contextmanager
def _outputs(front_end: tuple[nn.Module, int] | None) -> Iterator[list[Tensor]]:
    """Yield a list that a pass fills with the front end's output (B, T, C); it stays empty where there is none."""
    found: list[Tensor] = []
    if front_end is None:
        yield found
        return
    module, axis = front_end
    handle = module.register_forward_hook(lambda _, __, output: found.append(output if axis == 2 else output.mT))
    try:
        yield found
    finally:
        handle.remove()


def open_s3prl(spec: str, device: str = "cpu") -> S3prlSource:
    """Open ``s3prl:NAME`` or ``s3prl:NAME:PATH_OR_URL``, such as s3prl:fbank or s3prl:hf_hubert_custom:FOLDER.

    Raises:
        ValueError: see :class:`S3prlSource`.
    """
    name, _, path = spec.removeprefix(PREFIX).partition(":")
    return S3prlSource(name, path or None, device)


def one_by_one(
    extract: OneByOne, wavs: Tensor, num_samples: Tensor, rates: Sequence[int], grid: int | None
) -> tuple[list[Tensor], Tensor]:
    """Extract the utterances of a padded batch each by itself and pad their frames.

    Foreign models let padding in (normalisation over time, convolutions without a mask), so that an utterance's frames
    would depend on its batch; by themselves they cannot. ``extract`` maps (S,) to layers (T_l, D_l).
    Returns layers (B, T, D_l) and frame counts (B,).
    """
    found = []
    for wav, count in zip(wavs, num_samples.tolist(), strict=True):
        layers = extract(wav[:count])
        found.append(layers if grid is None else to_grid(layers, rates, count, grid))
    counts = torch.tensor([len(layers[0]) for layers in found])
    return [pad_sequence(list(rows), batch_first=True) for rows in zip(*found, strict=True)], counts


def to_grid(layers: Sequence[Tensor], rates: Sequence[int], num_samples: int, grid: int = GRID) -> list[Tensor]:
    """Bring the layers (T_l, D_l) of one utterance, a frame per ``rates[l]`` samples, to a frame per ``grid`` samples.

    Grid frame t begins at sample ``grid * t`` and takes the last frame that begins no later: of a faster model every
    second one or so, of a slower one each several times. There are ``(num_samples - 400) // grid + 1``, the frames of
    log-mel and of the phone labels, so what S3PRL or a padded end adds is left out. Models differ in where a frame's
    window lies around its start, so frames of two of them meet to within about half a frame, not exactly.
    """
    count = max(0, (num_samples - WINDOW) // grid + 1)
    start = torch.arange(count) * grid
    return [layer[(start // rate).clamp(max=len(layer) - 1)] for layer, rate in zip(layers, rates, strict=True)]


def _build(name: str, path_or_url: str | None, options: dict[str, Any] | None) -> nn.Module:
    """Build the upstream without moving any random state; what goes wrong becomes one line that names it."""
    from s3prl import hub
    from s3prl.nn import S3PRLUpstream

    _complete(hub)
    if name not in hub.options():
        near = nearest(name, hub.options())
        raise ValueError(f"{PREFIX}{name}: S3PRL has no such upstream" + (f", did you mean {near!r}?" if near else ""))
    try:
        with rng_preserved():
            return S3PRLUpstream(name, path_or_url=path_or_url, extra_conf=options)
    except Exception as error:  # S3PRL's hundred upstreams fail in as many ways; each is a wrong name, path or network
        given = f"{PREFIX}{name}" + (f":{path_or_url}" if path_or_url else "")
        reason = " ".join(str(error).split()) or "no reason given"
        raise ValueError(
            f"{given}: S3PRL cannot build it ({type(error).__name__}: {reason}); names in _local and _custom need a "
            "path, others download their weights once"
        ) from error


def _complete(hub: ModuleType) -> None:
    """Add SSAMBA's names where the registration has not."""
    from s3prl_upstream.ssamba import hubconf

    for name, function in vars(hubconf).items():
        if name.startswith("ssamba") and callable(function) and not hasattr(hub, name):
            setattr(hub, name, function)
