"""The batched critics of the held-out bounds against a plain loop: one critic, autograd, whole matrices of scores."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from espnet_mamba.analysis import bound_values
from espnet_mamba.analysis.bound_losses import Pairs, infonce_gradient, product_gradient, smile_gradient
from espnet_mamba.analysis.bound_training import _Step
from espnet_mamba.analysis.bounds import ESTIMATORS, BoundSettings, held_out_bounds
from espnet_mamba.analysis.separable_critic import SeparableCritics, bend, pair_rows, tower

SHORT = BoundSettings(
    steps=24,
    batch_frames=48,
    check_every=10,
    check_frames=120,
    held_out_frames=300,
    seeds=3,
    resamples=20,
    hidden=7,
    embedding=5,
)


@pytest.fixture
def plain(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import plain_bounds

    return plain_bounds


def uneven(layers=2, seed=0):
    """Frames of 12 utterances of different lengths, in no order; x 4 wide, layers 6 wide with something of x in."""
    generator = torch.Generator().manual_seed(seed)
    utterance = torch.repeat_interleave(torch.arange(12), torch.arange(40, 100, 5))
    utterance = utterance[torch.randperm(len(utterance), generator=generator)]
    x = torch.randn(len(utterance), 4, generator=generator)
    y = torch.randn(layers, len(utterance), 6, generator=generator)
    y[:, :, :4] += torch.arange(layers)[:, None, None] * torch.cat([x[:, :2], x[:, 2:].abs()], 1)
    return x, y, utterance


def test_batched_critics_have_the_plain_loops_values(plain):
    x, y, utterance = uneven()
    expected = plain.plain_bounds(x, y, utterance, SHORT, seed=4)
    found = held_out_bounds(x, y, utterance, SHORT, seed=4)
    for name in ESTIMATORS:
        assert [bound.value for bound in found[name]] == pytest.approx(expected[name], abs=2e-4), name
        assert found[name][1].value > 0.2  # not all 0


def test_how_many_go_at_once_changes_nothing(monkeypatch):
    x, y, utterance = uneven()
    together = held_out_bounds(x, y, utterance, SHORT)
    for at_once, tile in ((1, 2**18), (8, 1000), (20, 50)):
        monkeypatch.setattr(bound_values, "_TILE", tile)
        apart = held_out_bounds(x, y, utterance, replace(SHORT, critics_at_once=at_once))
        for name in ESTIMATORS:
            for one, other in zip(apart[name], together[name], strict=True):
                assert [one.value, one.low, one.high] == pytest.approx([other.value, other.low, other.high], abs=1e-4)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_gradients_of_the_losses_are_autograds(plain, name, warm):
    generator = torch.Generator().manual_seed(1)
    scores = 3.0 * torch.randn(2, 20, 20, generator=generator)
    utterance = torch.randint(4, (2, 20), generator=generator)
    pairs, log_mean, grad = Pairs.of(utterance), torch.tensor([math.nan, 0.7]), torch.empty_like(scores)
    moved = log_mean
    if name == "smile_heldout":
        smile_gradient(scores, pairs, grad)
    elif warm or name == "infonce_heldout":
        infonce_gradient(scores, pairs, grad, centred=name == "nwj_heldout")
    else:
        moved = product_gradient(scores, pairs, grad, log_mean if name == "dv_heldout" else None, 0.01)
    for run in range(2):
        leaf = scores[run].clone().requires_grad_(True)
        different = utterance[run][:, None] != utterance[run][None]
        assert torch.equal(pairs.different[run], different.float())
        loss, mean = plain.loss(name, leaf, different, warm, log_mean[run], 0.01)
        loss.backward()
        assert torch.allclose(grad[run], leaf.grad, atol=1e-6, rtol=1e-4)
        if name == "dv_heldout" and not warm:
            assert float(moved[run]) == pytest.approx(float(mean), abs=1e-5)


def test_gradients_of_the_weights_are_autograds(plain):
    """Two runs, all estimators: every weight's gradient, through the towers, the bend and the gain."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    critics = SeparableCritics.create(generators, len(ESTIMATORS), (4, 6), 7, 5)
    critics.flat.add_(0.3 * torch.randn(critics.flat.shape, generator=generators[0]))  # unlike one another, past 0
    x, y, base = (torch.randn(*shape, generator=generators[1]) for shape in ((2, 16, 4), (2, 16, 6), (2, 16, 16)))
    utterance = torch.arange(16).expand(2, -1) % 5
    step = _Step(critics, SHORT, 16)
    step.gradients(x, y, base, Pairs.of(utterance), step=0)
    for number in range(len(critics.gain)):
        run, estimator = divmod(number, len(ESTIMATORS))
        weights = [critics.gain[number, 0].clone()]
        for first, bias, out in (critics.side_x, critics.side_y):
            parts = first[number, :6].T, first[number, 6:].T, bias[number].T, out[number].T
            weights += [part.clone() for part in parts]
        weights = [weight.requires_grad_(True) for weight in weights]
        score = plain.scores(weights, x[run], y[run], base[run])
        different = utterance[run][:, None] != utterance[run][None]
        plain.loss(ESTIMATORS[estimator], score, different, True, torch.tensor(math.nan), 0.01)[0].backward()
        found = [step.into.gain[number, 0]]
        for first, bias, out in (step.into.side_x, step.into.side_y):
            found += [first[number, :6].T, first[number, 6:].T, bias[number].T, out[number].T]
        for weight, own in zip(weights, found, strict=True):
            assert torch.allclose(own, weight.grad, atol=1e-5, rtol=1e-4), (number, own.shape)


def test_sums_by_utterance_are_those_of_the_whole_matrix():
    critics = SeparableCritics.create([torch.Generator().manual_seed(0)], 2, (4, 6), 7, 5)
    x, y, utterance = uneven(1)
    base, clip = 0.1 * x[:, :1] * y[0, :, 0], torch.tensor([math.inf, 0.5])
    found = bound_values.pair_sums(critics, (x, y[0]), base.__getitem__, utterance, clip)
    left, right = pair_rows(tower(critics.side_x, x).output, tower(critics.side_y, y[0]).output)
    sums = base + torch.bmm(left.transpose(1, 2), right)
    scores = bend(sums, None, torch.empty_like(sums))
    ratio = torch.stack([scores[0].exp(), scores[1].clamp(-0.5, 0.5).exp()])
    member = torch.nn.functional.one_hot(utterance, 12).float()
    assert torch.allclose(found.true, scores.diagonal(dim1=1, dim2=2), atol=1e-5)
    assert torch.allclose(found.ratio, ratio.diagonal(dim1=1, dim2=2), atol=1e-5)
    assert torch.allclose(found.by_utterance, ratio @ member, rtol=1e-4)
    assert np.isfinite(found.by_utterance.numpy()).all()
