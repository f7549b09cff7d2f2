"""What a training step is compared with: the same model with other people's scans, and the Transformer.

Letters: B utterances, T frames, D width, E channels, N states, W taps of the convolution.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import select_loop
from timing import available_mb
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from espnet_mamba.efficiency.peers import mamba_ssm, slow_mamba
from espnet_mamba.layers.mamba import Mamba, decay_rates
from espnet_mamba.models.config import HubertConfig, load_config
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.pretraining import HubertForPretraining

MODELS = Path(__file__).resolve().parents[1] / "conf" / "models"
SAMPLE_RATE, FRAMES_PER_SECOND = 16000, 50
NUM_CLASSES = 504
ADAMW = {"lr": 5e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.01}


class Work(NamedTuple):
    """A batch of one shape on one device."""

    size: str  # of the models: tiny, small or base
    batch: int
    seconds: float
    device: str = "cpu"
    use_amp: bool = False

    @property
    def num_samples(self) -> int:
        """Of each utterance: 400 of the first frame and 320 of each further one."""
        return 400 + 320 * (round(self.seconds * FRAMES_PER_SECOND) - 2)

    @property
    def audio(self) -> float:
        """Seconds in the batch."""
        return self.batch * self.num_samples / SAMPLE_RATE


class Candidate(NamedTuple):
    """A model and how it is run."""

    model: str  # without its size
    build: Callable[[HubertConfig], HubertModel]
    refuses: Callable[[str], str] = lambda device: ""
    context: Callable[[], AbstractContextManager] = nullcontext
    state_copies: float = 0.0  # (B, T, E, N) arrays in float32 that each layer keeps for the backward pass


class PlainMamba(nn.Module):
    """Our Mamba's weights in the plain path that mamba-ssm has for tests: PyTorch's convolution, a loop over frames."""

    def __init__(self, mixer: Mamba, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.mixer, self.scan = mixer, scan

    def forward(self, x: Tensor, lengths: Any = None, state: Any = None) -> tuple[Tensor, None]:
        """Mix ``x (B, T, D)``, unpadded."""
        mixer = self.mixer
        hidden, gate = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (B, E, T) each
        hidden = F.silu(mixer.conv1d(F.pad(hidden, (mixer.conv1d.kernel_size[0] - 1, 0))))
        dt, Bmat, Cmat = mixer.x_proj(hidden.transpose(1, 2)).split(mixer.splits, dim=-1)
        dt = F.linear(dt, mixer.dt_proj.weight).transpose(1, 2)
        over_time = (Bmat.transpose(1, 2), Cmat.transpose(1, 2))
        y = self.scan(hidden, dt, decay_rates(mixer.A_log), *over_time, mixer.D, gate, mixer.dt_proj.bias)
        return mixer.out_proj(y.transpose(1, 2).to(x.dtype)), None


def reference_scan() -> tuple[Callable[..., Tensor], str]:
    """Return mamba-ssm's ``selective_scan_ref`` where that is installed, else a loop of the same form; and its name."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
    except Exception:  # not installed, or built against another torch
        return select_loop, "mamba-ssm's reference scan (a loop of its form; the package is not installed)"
    return lambda *args: selective_scan_ref(*args, delta_softplus=True), "mamba-ssm's selective_scan_ref"


def _ours(config: HubertConfig) -> HubertModel:
    return HubertModel(config)


def _with_reference_scan(config: HubertConfig) -> HubertModel:
    model = HubertModel(config)
    for block in model.blocks:
        block.mixer = PlainMamba(block.mixer, reference_scan()[0])
    return model


def _needs(package: str, cuda: bool = False) -> Callable[[str], str]:
    def refuses(device: str) -> str:
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        return f"{package} runs on CUDA only" if cuda and not device.startswith("cuda") else ""

    return refuses


CANDIDATES = {
    "mamba, ours": Candidate("mamba", _ours),
    "mamba, mamba-ssm's reference scan": Candidate("mamba", _with_reference_scan, state_copies=9),
    "mamba, transformers' slow path": Candidate("mamba", slow_mamba, _needs("transformers"), state_copies=10),
    "mamba, mamba-ssm's layer": Candidate("mamba", mamba_ssm, _needs("mamba_ssm", cuda=True)),
    "extbimamba, ours": Candidate("extbimamba", _ours),
    "transformer, fused attention": Candidate("transformer", _ours),
    "transformer, eager attention": Candidate("transformer", _ours, context=lambda: sdpa_kernel(SDPBackend.MATH)),
}


class Step:
    """The trainer's own update (``TrainingRun._update``) on a fixed batch: forward, backward, clipping, fused AdamW."""

    compiles = False

    def __init__(self, name: str, work: Work) -> None:
        from espnet2.train.distributed_utils import DistributedOption

        from espnet_mamba.train.espnet_model import ESPnetHubertModel
        from espnet_mamba.train.optimizers import build_optimizer
        from espnet_mamba.train.trainer import TrainingRun

        candidate = CANDIDATES[name]
        self.context, self.config, self.number = candidate.context, config_of(name, work), 0
        self.first_loss = float("nan")  # the same for all that compute the same
        torch.manual_seed(0)
        model = HubertForPretraining(self.config, NUM_CLASSES)
        model.hubert = candidate.build(self.config)
        model = ESPnetHubertModel(model.to(work.device))
        options = SimpleNamespace(
            output_dir=tempfile.mkdtemp(prefix="bench_train."),
            ngpu=int(work.device.startswith("cuda")),
            use_amp=work.use_amp,
            **{"seed": 0, "grad_clip": 10.0, "grad_clip_type": 2.0, "peak_tflops": None, "use_tensorboard": False},
            **{"max_steps": 10**9, "max_nonfinite_steps": 10, "accum_grad": 1},
        )
        optimizer = build_optimizer(model, torch.optim.AdamW, ADAMW)
        self.training = TrainingRun(model, optimizer, None, options, DistributedOption())
        generator = torch.Generator().manual_seed(1)
        speech = 0.1 * torch.randn(work.batch, work.num_samples, generator=generator)
        frames = (work.num_samples - 400) // 320 + 1
        labels = torch.randint(0, NUM_CLASSES, (work.batch, frames), generator=generator)
        self.values = {"speech": speech.to(work.device), "labels": labels.to(work.device)}
        model.train()

    def run(self, which: str = "") -> float:
        """Make one update; return the norm of its gradient."""
        self.number += 1
        with self.context():
            norm = self.training._update(self.number, [self.values])
        if self.number == 1:
            self.first_loss = self.training.meter.row(False, self.training.device, 0.0)["loss"]
        return norm


def config_of(name: str, work: Work) -> HubertConfig:
    """Return a candidate's model of the wanted size, without dropped layers: every step does the same work."""
    config = load_config(MODELS / f"{CANDIDATES[name].model}_{work.size}.yaml")
    return dataclasses.replace(config, layer_drop=0.0)


def build_step(name: str, work: Work) -> Step:
    """Return a candidate's step; a function of its own so that another process can call it."""
    return Step(name, work)


def refusal(name: str, work: Work) -> str:
    """Return why a candidate is left out, or an empty string."""
    candidate, config = CANDIDATES[name], config_of(name, work)
    frames = work.batch * round(work.seconds * FRAMES_PER_SECOND)
    states = frames * config.expand * config.embed_dim * config.state_size * 4 / 2**20
    need, free = candidate.state_copies * config.num_layers * states, available_mb(work.device)
    if need > 0.8 * free:
        return f"would take about {need / 1024:.0f} GiB, {free / 1024:.0f} GiB are free"
    return candidate.refuses(work.device)


def names_of(models: Sequence[str]) -> list[str]:
    """Return the candidates that are of ``models``."""
    return [name for name, candidate in CANDIDATES.items() if candidate.model in models]
