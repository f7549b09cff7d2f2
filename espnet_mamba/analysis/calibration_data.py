"""Data whose mutual information is known: what every estimator of it is tested on.

Gaussians of any width and information, both sides scaled, a chain of noisier and noisier layers, a dependence without
correlation, frames that follow one another slowly, labels through a noisy channel.
F frames, D width, L layers (each with its own truth, in nats per frame).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from espnet_mamba.analysis.sampling import seed_from, torch_generator


@dataclass(frozen=True)
class KnownCase:
    """One reference x (F, D) and layers (F, D_l), each with what it knows of x; utterance (F,) numbers frames."""

    name: str
    dim: int
    x: Tensor
    layers: list[Tensor]
    labels: list[str]
    truths: list[float]
    utterance: Tensor

    def recut(self, frames: int) -> KnownCase:
        """Return the same frames in utterances of ``frames`` each; what is left over goes."""
        whole = len(self.x) // frames * frames
        layers = [layer[:whole] for layer in self.layers]
        return replace(self, x=self.x[:whole], layers=layers, utterance=torch.arange(whole) // frames)


def equal_utterances(frames: int, utts: int) -> Tensor:
    """Return the utterance of each of F frames (F,); ValueError when ``utts`` does not divide ``frames``."""
    if utts < 1 or frames % utts:
        raise ValueError(f"{frames} frames do not make {utts} utterances of equal length; give a multiple of {utts}")
    return torch.arange(frames) // (frames // utts)


def correlation_of(nats: float, dim: int) -> float:
    """Return the correlation of every one of ``dim`` pairs that share ``nats`` in all: I = -D/2 ln(1 - rho^2)."""
    return math.sqrt(-math.expm1(-2.0 * nats / dim))


def gaussians(dim: int, truths: Sequence[float], frames: int, utts: int, seed: int, memory: float = 0.0) -> KnownCase:
    """Return jointly Gaussian frames; with ``memory`` each frame keeps that share of the one before it (AR(1)).

    x and the noise have the same memory, so a frame of y still knows ``truths`` of its own frame of x.
    """
    draw = _Draw(("calibration", dim, seed), frames, utts, memory)
    x = draw.frames(dim)
    layers = []
    for nats in truths:
        rho = correlation_of(nats, dim)
        layers.append(rho * x + math.sqrt(1.0 - rho**2) * draw.frames(dim))
    name = f"Gaussian, AR {memory:g}" if memory else "Gaussian"
    labels = [f"I = {nats:g}" for nats in truths]
    return KnownCase(name, dim, x, layers, labels, list(truths), equal_utterances(frames, utts))


class _Draw:
    """Standard normal frames, one block after another from one generator; every utterance begins anew."""

    def __init__(self, key: tuple[object, ...], frames: int, utts: int, memory: float = 0.0) -> None:
        self.generator, self.shape, self.memory = torch_generator(*key), (utts, frames // utts), memory

    def frames(self, dim: int) -> Tensor:
        """Return (F, ``dim``)."""
        noise = torch.randn(*self.shape, dim, generator=self.generator)
        if self.memory:
            noise[:, 1:] *= math.sqrt(1.0 - self.memory**2)
            noise = torch.from_numpy(lfilter([1.0], [1.0, -self.memory], noise.numpy(), axis=1)).float()
        return noise.flatten(0, 1)


def scaled(case: KnownCase, factor_x: float, factor_y: float) -> KnownCase:
    """Return the case with both sides multiplied: the information is the same."""
    name = f"scaled x {factor_x:g}, y {factor_y:g}"
    return replace(case, name=name, x=case.x * factor_x, layers=[layer * factor_y for layer in case.layers])


def chain(frames: int, utts: int, seed: int, noise: float = 0.7, dim: int = 3) -> KnownCase:
    """Return x -> y -> z and x -> y -> p: y is x with noise, z is y with more, p is one coordinate of y.

    z and p are made from y alone, so neither can know more of x than y does (data processing inequality).
    """
    draw = _Draw(("calibration chain", seed), frames, utts)
    x, first, second = (draw.frames(dim) for _ in range(3))
    y = x + noise * first
    layers = [y, y + noise * second, y[:, :1].contiguous()]
    truths = [0.5 * dim * math.log1p(1.0 / (k * noise**2)) for k in (1, 2)] + [0.5 * math.log1p(1.0 / noise**2)]
    labels = ["y = x + noise", "z = y + noise", "p = one coordinate of y"]
    return KnownCase("chain", dim, x, layers, labels, truths, equal_utterances(frames, utts))


def folded(frames: int, utts: int, seed: int, noise: float = 0.2) -> KnownCase:
    """Return y = |x| + noise, which has no correlation with x; its information by numerical integration."""
    draw = _Draw(("calibration folded", seed), frames, utts)
    x = draw.frames(1)
    y = x.abs() + noise * draw.frames(1)
    truth = folded_information(noise)
    return KnownCase("y = |x| + noise", 1, x, [y], [f"I = {truth:.3g}"], [truth], equal_utterances(frames, utts))


def folded_information(noise: float) -> float:
    """Return I(x; |x| + noise) = H(y) - H(noise) in nats, x standard normal, by the trapezoidal rule."""
    x, y = np.linspace(0.0, 9.0, 2001), np.linspace(-8.0 * noise, 9.0 + 8.0 * noise, 2001)
    folded_normal = 2.0 * np.exp(-(x**2) / 2.0) / math.sqrt(2.0 * math.pi)
    kernel = np.exp(-(((y[:, None] - x) / noise) ** 2) / 2.0) / (math.sqrt(2.0 * math.pi) * noise)
    density = np.trapezoid(kernel * folded_normal, x, axis=1)
    entropy = -np.trapezoid(density * np.log(np.maximum(density, 1e-300)), y)
    return float(entropy - 0.5 * math.log(2.0 * math.pi * math.e * noise**2))


def noisy_channel(labels: int, kept: float, frames: int, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return labels (F,), codes (F,) and their information: a code is its label with chance ``kept``, else any."""
    rng = np.random.default_rng(seed_from("calibration codes", labels, kept, seed))
    said = rng.integers(0, labels, frames)
    codes = np.where(rng.random(frames) < kept, said, rng.integers(0, labels, frames))
    right, wrong = kept + (1.0 - kept) / labels, (1.0 - kept) / labels
    truth = math.log(labels) + sum(n * p * math.log(p) for n, p in ((1, right), (labels - 1, wrong)) if p > 0)
    return said, codes, truth
