"""The published mutual information protocol against a plain loop, and its gradient by hand against autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from espnet_mamba.analysis.concat_critic import ConcatCritic, ConcatTraining
from espnet_mamba.analysis.mine import (
    MinePaperSettings,
    UtterancePair,
    _donsker_varadhan,
    _draw_minibatches,
    mine_paper,
)
from espnet_mamba.analysis.sampling import torch_generator


def noise_pairs(dim, frames, utts=4, layers=1):
    generator = torch.Generator().manual_seed(0)
    return [
        UtterancePair(
            f"u{i}",
            torch.randn(frames, dim, generator=generator),
            torch.randn(layers, frames, dim, generator=generator),
        )
        for i in range(utts)
    ]


def critics(groups, dim_x, dim_y, hidden, seed=0):
    return ConcatCritic.create([torch_generator(seed, i) for i in range(groups)], dim_x, dim_y, hidden)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_gradient_by_hand_is_autograds(precision, tolerance):
    """Sides of different widths, three critics; the bound ignores a constant, so bias3 gets exactly 0 by hand.

    In bfloat16 units near 0 fall on the other side of the ReLU, which is a tenth of so small a gradient.
    """
    critic, generator = critics(3, 5, 7, 11), torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 5, generator=generator), torch.randn(3, 32, 7, generator=generator)
    order = torch.randperm(32, generator=generator)
    training = ConcatTraining(critic, 32, 1e-3, precision)
    training.differentiate(x.to(precision), y.to(precision), order)
    leaf = critic.flat.clone().requires_grad_(True)
    _donsker_varadhan(*critic.over(leaf).scores(x, y, order)).sum().neg().backward()
    wanted = critic.over(leaf.grad)
    for name in ("weight_x", "weight_y", "bias1", "weight2", "bias2", "weight3"):
        found, expected = getattr(training.gradient, name), getattr(wanted, name)
        assert found.shape == expected.shape and expected.norm() > 0
        assert (found - expected).norm() <= tolerance * expected.norm(), name
    assert (training.gradient.bias3 == 0).all() and wanted.bias3.abs().max() < 1e-6


def test_scores_are_those_of_the_concatenated_input():
    critic, (pair,) = critics(2, 6, 6, 9), noise_pairs(6, 10, utts=1, layers=2)
    order = torch.randperm(10)
    scores = critic.scores(pair.x, pair.y, order)
    for index, layer in enumerate(pair.y):
        model = plain_model(critic, index)
        for found, other in zip(scores, (layer, layer[order]), strict=True):
            assert torch.allclose(found[index], model(torch.cat([pair.x, other], 1))[:, 0], atol=1e-6)


def test_bfloat16_gives_the_same_values():
    """Equal within the spread that other draws bring; at width 768 this was measured: docs/benchmarks.md."""
    pairs, settings = noise_pairs(64, 96, layers=2), MinePaperSettings(epochs=40, minibatch=32, learning_rate=1e-3)
    plain, rounded = (mine_paper(pairs, replace(settings, precision=name)) for name in ("float32", "bfloat16"))
    other = mine_paper(pairs, settings, seed=1)
    assert not torch.equal(plain, rounded) and plain.mean() > 1.0
    assert (plain - rounded).abs().mean() < (plain - other).abs().mean()
    assert rounded.mean().item() == pytest.approx(plain.mean().item(), rel=0.03)


def test_finds_nats_in_independent_noise():
    """The published defect, reproduced: docs/papers.md 6 gives 4.33 (sd 0.88) nats at 768 dimensions and 750 frames."""
    value = mine_paper(noise_pairs(768, 750, utts=2), MinePaperSettings()).mean()
    assert 3.0 < value < 6.0


def test_trains_nothing_below_a_minibatch():
    values = mine_paper(noise_pairs(16, 100), MinePaperSettings(epochs=3))
    assert values.abs().max() < 0.05


def test_neither_batch_nor_order_nor_threads_change_a_value():
    pairs = noise_pairs(12, 70, utts=3, layers=2) + [UtterancePair("long", *_long_pair())]
    settings = MinePaperSettings(epochs=20, minibatch=32, learning_rate=1e-2)
    together = mine_paper(pairs, settings)
    backwards = mine_paper(pairs[::-1], replace(settings, problems_at_once=1)).flip(0)
    alone = torch.cat([mine_paper([pair], settings) for pair in pairs])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threaded = mine_paper(pairs, settings)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for other in (backwards, alone, threaded):
        assert torch.allclose(together, other, atol=2e-3)
    assert together.std() > 0.01


def _long_pair():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(150, 12, generator=generator), torch.randn(2, 150, 12, generator=generator)


def plain_model(critic, index):
    """The published critic as torch modules, with the weights of one of ours."""
    _, dim_x, dim_y, hidden = critic.sizes
    linears = [torch.nn.Linear(*shape) for shape in ((dim_x + dim_y, hidden), (hidden, hidden), (hidden, 1))]
    weights = (torch.cat([critic.weight_x[index], critic.weight_y[index]], 1), critic.weight2[index])
    biases = (critic.bias1, critic.bias2, critic.bias3)
    for linear, weight, bias in zip(linears, (*weights, critic.weight3[index]), biases, strict=True):
        linear.weight.data, linear.bias.data = weight.clone(), bias[index].flatten().clone()
    return torch.nn.Sequential(linears[0], torch.nn.ReLU(), linears[1], torch.nn.ReLU(), linears[2])


def plain_estimate(model, name, x, y, settings):
    """What the published script does with one utterance and layer: a fresh Adam, minibatches, a value on all frames."""

    def bound(x, y, order):
        joint, marginal = model(torch.cat([x, y], 1)), model(torch.cat([x, y[order]], 1))
        return joint.mean() - (torch.logsumexp(marginal, 0) - math.log(len(x))).squeeze()

    optimiser = torch.optim.Adam(model.parameters(), settings.learning_rate)
    for batch, order in zip(*_draw_minibatches(UtterancePair(name, x, y[None]), settings, 0), strict=True):
        optimiser.zero_grad()
        (-bound(x[batch], y[batch], order)).backward()
        optimiser.step()
    return bound(x, y, torch.randperm(len(x), generator=torch_generator("value", 0, name))).item()


def test_agrees_with_a_plain_loop():
    """One critic as the published script has it: torch modules, torch's Adam, a loop over minibatches."""
    (pair,), settings = noise_pairs(6, 80, utts=1, layers=2), MinePaperSettings(epochs=10, minibatch=32)
    settings = replace(settings, learning_rate=3e-3)
    critic = ConcatCritic.create([torch_generator("critic", 0, pair.name, i) for i in range(2)], 6, 6, 100)
    expected = [plain_estimate(plain_model(critic, i), pair.name, pair.x, pair.y[i], settings) for i in range(2)]
    assert mine_paper([pair], settings)[0].tolist() == pytest.approx(expected, rel=0.02)


def test_reused_critic_agrees_with_a_plain_loop(monkeypatch):
    """As it ran, file by file: one statistics network through each layer of all utterances, only Adam begins anew."""
    monkeypatch.setattr("espnet_mamba.analysis.mine.UTTERANCES_OF_A_FILE", 2)
    pairs = noise_pairs(6, 80, utts=3, layers=2)
    settings = MinePaperSettings(epochs=10, minibatch=32, learning_rate=1e-3, reuse_critic=True)
    model = plain_model(ConcatCritic.create([torch_generator("critic", 0)], 6, 6, settings.hidden), 0)
    expected = torch.empty(3, 2)
    for utt, layer in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)):
        pair = pairs[utt]
        expected[utt, layer] = plain_estimate(model, f"{pair.name}/{layer}", pair.x, pair.y[layer], settings)
    assert torch.allclose(mine_paper(pairs, settings), expected, rtol=0.03, atol=2e-3)


def test_reused_critic_hangs_on_what_came_before():
    pairs, settings = noise_pairs(8, 64, utts=2), MinePaperSettings(epochs=40, minibatch=32, learning_rate=1e-3)
    reused = mine_paper(pairs, replace(settings, reuse_critic=True))
    later_alone = mine_paper(pairs[1:], replace(settings, reuse_critic=True))
    assert abs(reused[1] - later_alone[0]).item() > 1e-3


def test_one_critic_for_all_and_a_short_utterance():
    """One critic goes through everything in turn; an utterance too short to fill a minibatch leaves it as it is."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(frames, 6, generator=generator) for frames in (70, 20, 70)]
    pairs = [UtterancePair(f"u{i}", part, torch.stack([part, part.flip(0)])) for i, part in enumerate(x)]
    settings = MinePaperSettings(epochs=20, minibatch=32, learning_rate=3e-3, reuse_critic=True)
    values = mine_paper(pairs, settings)
    assert values.shape == (3, 2)
    without = mine_paper([pairs[0], pairs[2]], settings)  # 20 frames fill no minibatch: they change nothing after them
    assert torch.allclose(values[[0, 2]], without, atol=1e-5)
    assert torch.allclose(mine_paper(pairs[:1], settings)[:, 0], values[:1, 0], atol=1e-5)


@pytest.mark.slow
def test_published_critic_grows_old_as_docs_papers_say():
    """One critic through 8 utterances of independent noise: the values fall from over 4 nats to about 2.6."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        UtterancePair(f"u{i}", *(torch.randn(*shape, generator=generator) for shape in ((750, 768), (1, 750, 768))))
        for i in range(8)
    ]
    values = mine_paper(pairs, MinePaperSettings(reuse_critic=True))[:, 0]
    assert values[0] > 3.5 and values[4:].mean() < values[0] - 0.7 and (values > 1.5).all()


def test_bad_settings_and_no_utterance():
    with pytest.raises(ValueError, match="precision 'int8' is not one of: float32, bfloat16"):
        MinePaperSettings(precision="int8")
    with pytest.raises(ValueError, match="problems_at_once 0 given, at least 1"):
        MinePaperSettings(problems_at_once=0)
    with pytest.raises(ValueError, match="no utterance"):
        mine_paper([], MinePaperSettings())
