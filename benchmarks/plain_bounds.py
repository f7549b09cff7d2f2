"""The held-out bounds as a plain loop: one critic after the other, by torch's autograd and whole matrices of scores.

What espnet_mamba.analysis.bounds is timed against, and tested against: same draws, same steps, same formulas, nothing
shared between critics but the split and the Gaussian scores.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.analysis.bound_settings import BoundSettings
from espnet_mamba.analysis.critics import linear_weights
from espnet_mamba.analysis.sampling import torch_generator
from espnet_mamba.analysis.separable_critic import LIMIT
from espnet_mamba.analysis.splits import Part, Problem

Weights = list[Tensor]  # gain, then per side: linear path, hidden layer, its bias, output


def plain_bounds(
    x: Tensor, y: Tensor, utterance: Tensor, settings: BoundSettings, seed: int = 0
) -> dict[str, list[float]]:
    """Return the held-out values (nats, mean over seeds, not cut at the ceiling) as ``held_out_bounds`` does.

    x (F, Dx), y (L, F, Dy), utterance (F,).
    """
    problem = Problem.create("", x, y, utterance, *settings.split, seed)
    values: dict[str, list[float]] = {}
    for name in settings.estimators:
        values[name] = []
        for layer in range(len(y)):
            runs = [one_critic(problem, name, layer, run, settings, seed) for run in range(settings.seeds)]
            values[name].append(sum(runs) / len(runs))
    return values


def one_critic(problem: Problem, name: str, layer: int, run: int, settings: BoundSettings, seed: int) -> float:
    """Train one critic; return its value on the held-out part by its weights where the select part liked them best."""
    weights = initial_weights(problem, layer, run, settings, seed)
    generator = torch_generator("bound batches", seed, problem.name, run)
    optimiser = torch.optim.Adam(weights, settings.learning_rate)
    part, best, kept, log_mean = problem.train, -math.inf, weights, torch.tensor(math.nan)
    towers = _towers(problem, part, layer)
    for step in range(settings.steps + 1):
        if step % settings.check_every == 0 or step == settings.steps:
            value = held_out_value(weights, problem, problem.select, name, layer, settings)[0]
            if value > best:
                best, kept = value, [weight.detach().clone() for weight in weights]
        if step == settings.steps:
            break
        index = _draw(len(part.utterance), settings.batch_frames, generator)
        score = scores(weights, part.x[index], part.y[layer][index], towers[0][index] @ towers[1][index].T)
        owner = part.utterance[index]
        warm = step < settings.steps * settings.warm_up
        value, log_mean = loss(name, score, owner[:, None] != owner[None], warm, log_mean, settings.ema_rate)
        optimiser.zero_grad()
        value.backward()
        optimiser.param_groups[0]["lr"] = rate = (
            0.5 * settings.learning_rate * (1.0 + math.cos(math.pi * step / settings.steps))
        )
        optimiser.step()
        with torch.no_grad():
            for weight in weights[1:]:
                weight.mul_(1.0 - rate * settings.weight_decay)
    shift = held_out_value(kept, problem, problem.select, name, layer, settings)[1]
    return held_out_value(kept, problem, problem.held_out, name, layer, settings, shift)[0]


def initial_weights(problem: Problem, layer: int, run: int, settings: BoundSettings, seed: int) -> Weights:
    """Return the fresh weights of a critic, as leaves that collect gradients."""
    generators = [torch_generator("bound", seed, problem.name, run, layer)]
    hidden, outputs = settings.hidden, 1 + settings.embedding
    weights = [torch.ones(1)]
    for dim in (problem.train.x.shape[1], problem.train.y.shape[2]):
        weights += [
            linear_weights(generators, (dim, outputs), dim)[0] * 0.1,
            linear_weights(generators, (dim, hidden), dim)[0] * 3**0.5,
            linear_weights(generators, (1, hidden), 1)[0],
            linear_weights(generators, (hidden, outputs), hidden)[0] * 0.1,
        ]
    return [weight.requires_grad_(True) for weight in weights]


def scores(weights: Weights, x: Tensor, y: Tensor, base: Tensor) -> Tensor:
    """Return T (N, M) of every pair of x (N, Dx) and y (M, Dy), whose Gaussian scores are base (N, M)."""
    gain, *rest = weights
    f, g = (
        side @ linear + (side @ hidden + bias).relu() @ out
        for side, (linear, hidden, bias, out) in ((x, rest[:4]), (y, rest[4:]))
    )
    score = gain * base + f[:, 1:] @ g[:, 1:].T + f[:, :1] + g[:, :1].T
    return score * (1.0 + (score / LIMIT).square().square()).rsqrt().sqrt()


def loss(
    name: str, score: Tensor, different: Tensor, warm: bool, log_mean: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """Return the loss of one batch: score, different (N, N); and the running mean's logarithm after it."""
    true, false = score.diagonal(), score.masked_fill(~different, -math.inf)
    if name == "smile_heldout":
        return F.softplus(-true).mean() + F.softplus(score)[different].mean(), log_mean
    log_batch = torch.logsumexp(false.flatten(), 0) - different.sum().log()
    if warm or name == "infonce_heldout":
        both = torch.where(torch.eye(len(score), dtype=torch.bool), score, false)
        value = -0.5 * sum((true - torch.logsumexp(both, axis)).mean() for axis in (0, 1))
        return value + (log_batch.square() if name == "nwj_heldout" else 0.0), log_mean
    if name == "nwj_heldout":
        return log_batch.exp() - true.mean(), log_mean
    now = log_batch.detach()
    moved = now if log_mean.isnan() else torch.logaddexp(log_mean + math.log(1.0 - rate), now + math.log(rate))
    return (log_batch - moved).exp() - true.mean(), moved


@torch.no_grad()
def held_out_value(
    weights: Weights,
    problem: Problem,
    part: Part,
    name: str,
    layer: int,
    settings: BoundSettings,
    shift: float | None = None,
) -> tuple[float, float]:
    """Return the value on a part, nats, and ln E_product[exp T]; ``shift`` is taken off NWJ's scores."""
    left, right = _towers(problem, part, layer)
    score = scores(weights, part.x, part.y[layer], left @ right.T)
    counted = (part.utterance[:, None] != part.utterance[None]) | torch.eye(len(score), dtype=torch.bool)
    true = score.diagonal()
    if name == "infonce_heldout":
        total = torch.logsumexp(score.masked_fill(~counted, -math.inf), 1)
        return float((true - total + counted.sum(1).log()).mean()), 0.0
    if name == "smile_heldout":
        score = score.clamp(-settings.smile_clip, settings.smile_clip)
    log_mean = float(score[counted].double().exp().mean().log())
    if name == "nwj_heldout":
        shift = log_mean if shift is None else shift
        return 1.0 + float(true.mean()) - shift - math.exp(log_mean - shift), log_mean
    return float(true.mean()) - log_mean, log_mean


def _towers(problem: Problem, part: Part, layer: int) -> tuple[Tensor, Tensor]:
    gaussian = problem.gaussian[layer]
    return gaussian.towers(part.x, part.y[layer], len(gaussian.square))


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    if count < size:
        return torch.randint(count, (size,), generator=generator)
    return torch.randperm(count, generator=generator)[:size]
