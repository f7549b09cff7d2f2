"""SSAMBA's masks and losses."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_models_ssamba import LENGTHS, SINGLE, SMALL, batch_of, speech

from espnet_mamba.models.ssamba.grid import PatchGrid
from espnet_mamba.models.ssamba.masking import mask_counts, square_mask
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining, info_nce, patch_pixels


def test_masks_have_exact_counts_and_stay_in_their_utterance():
    grid = PatchGrid([64, 30, 5, 1, 0], 8)
    counts = mask_counts(grid, 300, 512)
    assert counts.tolist() == [300, 141, 23, 5, 0]
    for squares in ((3, 5), (1, 1), (5, 5)):
        mask = square_mask(grid, counts, squares)
        assert mask.sum((1, 2)).tolist() == counts.tolist()
        assert not (mask & ~grid.valid).any()
    everything = square_mask(grid, 8 * grid.num_columns)
    assert torch.equal(everything, grid.valid)


def test_every_patch_is_masked_equally_often():
    """The first patch too, which the published sampler never picks; no corner is favoured."""
    generator = torch.Generator().manual_seed(0)
    grid = PatchGrid([64] * 1500, 8)
    rate = square_mask(grid, torch.full((1500,), 100), generator=generator).float().mean(0)
    spread = math.sqrt(100 / 512 * (1 - 100 / 512) / 1500)
    assert abs(rate[0, 0] - 100 / 512) < 5 * spread
    assert (rate - 100 / 512).abs().max() < 6 * spread
    again = square_mask(grid, torch.full((1500,), 100), generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert torch.equal(rate, again)


def test_squares_are_cut_at_the_edge_and_do_not_wrap():
    """With five patches of squares of side five nearly every mask is a part of one square."""
    grid = PatchGrid([20] * 400, 8)
    mask = square_mask(grid, torch.full((400,), 5), (5, 5), torch.Generator().manual_seed(0))
    right, left = mask[:, :, -1].any(1), mask[:, :, 0].any(1)
    assert right.sum() > 40 and left.sum() > 40
    assert (right & left).sum() < 0.2 * right.sum()  # a square that went on in the next band would touch both sides
    columns = mask.any(1)
    first, last = columns.int().argmax(1), 19 - columns.flip(1).int().argmax(1)
    assert ((last - first) < 5).float().mean() > 0.85


def test_what_is_too_much_is_given_back_at_random():
    """Not from the highest index down: of one square over all patches, every patch stays unmasked equally often."""
    grid = PatchGrid([5] * 2000, 5)
    mask = square_mask(grid, torch.full((2000,), 20), (9, 9), torch.Generator().manual_seed(0))
    assert (mask.float().mean(0) - 0.8).abs().max() < 0.08


def test_gradients_reach_every_parameter():
    for config in (SMALL, dataclasses.replace(SINGLE, mask_passes=1, final_norm="twice")):
        model = SsambaForPretraining(config)
        wavs, num_samples = batch_of(LENGTHS)
        sums = model(wavs, num_samples)
        (sums.info_nce_sum / sums.num_masked + 10 * sums.mse).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not missing
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_batch_without_patches_costs_nothing():
    loss = SsambaForPretraining(SMALL)(torch.zeros(1, 399))
    assert int(loss.num_masked) == 0 and not loss.mse and not loss.info_nce_sum


def test_info_nce_by_hand():
    targets = torch.randn(7, 16) * 3
    loss, correct = info_nce(targets * 50, targets, [4, 3])
    assert loss < 1e-3 and correct == 7  # each prediction points at its own target
    predictions = torch.randn(7, 16)
    loss, _ = info_nce(predictions, targets, [4, 3])
    by_hand = 0.0
    for first, last in ((0, 4), (4, 7)):
        for p in range(first, last):
            scores = [float(predictions[p] @ targets[c]) for c in range(first, last)]
            by_hand += math.log(sum(math.exp(s - scores[p - first]) for s in scores))
    assert float(loss) == pytest.approx(by_hand, rel=1e-5)
    assert info_nce(torch.zeros(0, 16), torch.zeros(0, 16), [0])[0] == 0


def test_info_nce_runs_over_candidates():
    """A candidate that no prediction resembles costs nothing; a prediction that fits every candidate costs."""
    targets = torch.eye(3) * 20
    predictions = torch.stack([torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 0, 1.0])])
    loss, _ = info_nce(predictions, targets, [3])
    assert float(loss) == pytest.approx(math.log(3), abs=1e-4)
    over_predictions = -(targets @ predictions.T).log_softmax(1).diag().sum()
    assert abs(float(over_predictions) - math.log(3)) > 0.2  # the published axis scores this otherwise
    order = torch.tensor([2, 0, 1])
    assert info_nce(predictions[order], targets[order], [3])[0] == pytest.approx(float(loss), rel=1e-6)


def test_patches_are_cut_as_the_embedding_reads_them():
    features = torch.randn(2, 32, 64)
    expected = F.unfold(features[:, None], (16, 16), stride=16).transpose(1, 2).view(2, 2, 4, 256)
    assert torch.equal(patch_pixels(features, (16, 16)), expected)


def test_loss_reads_masked_patches_only_and_padding_never():
    model = SsambaForPretraining(SINGLE).eval()
    wavs, num_samples = batch_of((9000, 6500))
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    first = model(wavs, num_samples, draw())
    assert int(first.num_masked) == int(mask_counts(PatchGrid([4, 3], 2), 4, 8).sum()) == 7
    second = model(torch.nan_to_num(wavs, nan=0.5), num_samples, draw())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    grid = PatchGrid([4, 3], 2)
    features, _ = model.encoder.features(wavs, num_samples)
    masks = draw()
    square_mask(grid, torch.tensor([4, 3]), generator=masks)
    mask = square_mask(grid, torch.tensor([4, 3]), generator=masks)  # the second pass draws a mask of its own
    hidden = grid.to_grid(model.encoder.encode(features, grid, mask).output[:, 1:])[mask]
    targets = F.unfold(features[:, None], (16, 16), stride=16).transpose(1, 2).view(2, 2, 4, 256)[mask]
    torch.testing.assert_close(first.mse, (model.reconstruction_head(hidden) - targets).square().mean())


def test_a_few_steps_lower_both_losses():
    model = SsambaForPretraining(dataclasses.replace(SINGLE, embed_dim=32, mask_patches=5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    wavs = torch.stack([speech(20720, seed) for seed in range(4)])
    losses = []
    for step in range(40):
        torch.manual_seed(step)
        sums = model(wavs)
        losses.append((sums.info_nce_sum.item() / int(sums.num_masked), sums.mse.item()))
        (sums.info_nce_sum / sums.num_masked + 10 * sums.mse).backward()
        optimizer.step()
        optimizer.zero_grad()
    mean = lambda rows, part: sum(row[part] for row in rows) / len(rows)  # noqa: E731
    for part in (0, 1):
        assert mean(losses[-6:], part) < 0.8 * mean(losses[:4], part)
