"""Which patches the model must predict without seeing them: squares of the grid, and exactly as many as asked for.

Three things differ from the published sampler: every patch, the first one too, is picked equally often; a square that
leaves the grid is cut there and does not go on in the next band; what is masked too much is given back at random.
Letters: B utterances, G bands, C columns of the longest utterance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from espnet_mamba.models.ssamba.grid import PatchGrid


def mask_counts(grid: PatchGrid, mask_patches: int, num_patches: int) -> Tensor:
    """Return how many patches of each utterance are masked ``(B,)``: ``mask_patches`` of ``num_patches``, at least 1.

    An utterance of another length masks the same fraction; one without patches masks none.
    """
    total = grid.num_bands * grid.num_columns
    return torch.minimum((total * mask_patches / num_patches).round().long().clamp(min=1), total)


def square_mask(
    grid: PatchGrid, counts: Tensor, squares: tuple[int, int] = (3, 5), generator: torch.Generator | None = None
) -> Tensor:
    """Draw squares of patches, of one side per utterance, until exactly ``counts (B,)`` patches are covered.

    Squares may overlap and may hang over the grid's edges. They are put down in random order; the patches of the last
    one that are too many, chosen at random, stay unmasked.

    Args:
        grid: the patches of each utterance.
        counts: patches to mask, at most as many as there are.
        squares: least and greatest side of a square, each side equally likely.
        generator: source of randomness on the grid's device.

    Returns:
        ``(B, G, C)`` bool, true where masked; never where an utterance has no patch.
    """
    device, batch = grid.num_columns.device, len(grid.columns)
    least, greatest = squares
    sides = torch.randint(least, greatest + 1, (batch,), generator=generator, device=device)
    covered_at = torch.empty(batch, grid.num_bands, grid.total, device=device)
    for side in range(least, greatest + 1):
        # one score per place of a square; the earliest of the squares over a patch covers it
        places = (batch, 1, grid.num_bands + side - 1, grid.total + side - 1)
        scores = torch.rand(places, generator=generator, device=device)
        if grid.total:
            earliest = -F.max_pool2d(-scores, kernel_size=side, stride=1)
            covered_at = torch.where((sides == side)[:, None, None], earliest[:, 0], covered_at)
    covered_at = covered_at.masked_fill(~grid.valid, 2.0).flatten(1)
    shuffled = torch.rand(covered_at.shape, generator=generator, device=device).argsort(dim=1)
    order = shuffled.gather(1, covered_at.gather(1, shuffled).argsort(dim=1, stable=True))
    rank = order.argsort(dim=1)
    return (rank < counts[:, None]).view(batch, grid.num_bands, grid.total)
