"""The held-out bounds' values, from the sums over each utterance's frames of exp T: scores are never kept.

A part of F frames has F^2 scores per critic; they are made a tile at a time, small enough for a processor's cache, and
all four estimators, and all resamples of the utterances, need no more of them than ``PairSums``.
C critics, F frames, U utterances, W weightings of the utterances.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from espnet_mamba.analysis.separable_critic import SeparableCritics, bend, pair_rows, tower
from espnet_mamba.analysis.splits import Part

_TILE = 2**18  # scores at once
Bands = Callable[[slice], Tensor]  # rows of a (F, F) matrix that is made as needed


class PairSums(NamedTuple):
    """What the estimators need of the scores of all pairs."""

    true: Tensor  # (C, F) T of the true pairs
    ratio: Tensor  # (C, F) exp of the same, clipped where the estimator clips
    by_utterance: Tensor  # (C, F, U) sums of exp T_ij over the frames j of each utterance


class Value(NamedTuple):
    """One critic's value for every weighting; ln of its mean over the product, and the true pairs' share in that."""

    value: np.ndarray  # (W,)
    log_mean: float = 0.0
    crowding: float = 0.0


@dataclass(frozen=True)
class Population:
    """The frames that a value is over: whose each frame is, and the weightings of the utterances."""

    utterance: Tensor  # (F,) numbers
    member: Tensor  # (F, U) float64, 1 for the frame's own utterance
    weights: np.ndarray  # (W, U)
    pairs: np.ndarray  # (W,) weighted number of pairs of different utterances, and true ones
    log_candidates: Tensor  # (F,) float64 ln of InfoNCE's candidates

    @classmethod
    def of(cls, part: Part, weights: np.ndarray | None = None) -> Population:
        """Return that of a part; each utterance counts once when there are no ``weights``."""
        weights = np.ones((1, part.num_utts)) if weights is None else weights
        sizes = part.sizes()
        both = weights * sizes
        pairs = both.sum(1) ** 2 - (both**2).sum(1) + weights @ sizes
        candidates = torch.from_numpy(sizes.sum() - sizes + 1.0)[part.utterance]
        return cls(part.utterance, one_hot(part.utterance, part.num_utts).double(), weights, pairs, candidates.log())

    def infonce(self, sums: PairSums, critic: int) -> Value:
        """Return InfoNCE's value of one critic: the mean of T_ii - ln mean_j exp T_ij."""
        others = sums.by_utterance[critic] * (1.0 - self.member).float()
        terms = sums.true[critic] - (others.sum(1) + sums.ratio[critic]).log() + self.log_candidates
        return Value(self.weights @ (terms @ self.member).numpy() / (self.weights @ self.member.sum(0).numpy()))

    def donsker_varadhan(self, sums: PairSums, critic: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Return E_joint[T] and ln E_product[exp T] (W,) of one critic, and its crowding.

        The product's pairs are those of different utterances and the true ones.
        """
        own = (sums.ratio[critic].double() @ self.member).numpy()
        blocks = (self.member.T @ sums.by_utterance[critic].double()).numpy()
        np.fill_diagonal(blocks, 0.0)
        total = ((self.weights @ blocks) * self.weights).sum(1) + self.weights @ own
        joint = self.weights @ (sums.true[critic].double() @ self.member).numpy()
        joint /= self.weights @ self.member.sum(0).numpy()
        return joint, np.log(total / self.pairs), float(own.sum() / (own.sum() + blocks.sum()))

    def value(self, estimator: str, sums: PairSums, critic: int, shift: float | None = None) -> Value:
        """Return one critic's value.

        ``shift``, such as ln of its mean over another part's product, is taken off NWJ's T: NWJ needs T's constant, and
        a little off in T is much off in exp T. None takes this part's own best constant.
        """
        if estimator == "infonce_heldout":
            return self.infonce(sums, critic)
        joint, log_mean, crowding = self.donsker_varadhan(sums, critic)
        value = joint - log_mean
        if estimator == "nwj_heldout":
            shift = log_mean[0] if shift is None else shift
            value = 1.0 + joint - shift - np.exp(log_mean - shift)
        return Value(value, float(log_mean[0]), crowding)


@torch.no_grad()
def pair_sums(
    critics: SeparableCritics, frames: tuple[Tensor, Tensor], base: Bands, utterance: Tensor, clip: Tensor
) -> PairSums:
    """Score all pairs of ``frames`` (F, Dx), (F, Dy); ``base`` gives the Gaussian scores of a band of rows.

    utterance (F,) numbers from 0; clip (C,), in nats, limits T in the exponentials, inf for no limit.
    """
    count, size = len(clip), len(utterance)
    order = utterance.argsort(stable=True)  # sums over neighbours take a fifth of the time of a product with 0 and 1
    place, starts = order.argsort(), np.searchsorted(utterance[order].numpy(), np.arange(int(utterance.max()) + 1))
    frames = (frames[0], frames[1][order])
    rows = pair_rows(tower(critics.side_x, frames[0]).output, tower(critics.side_y, frames[1]).output)
    clip = clip[:, None, None]
    true, by_utterance = torch.empty(count, size), torch.empty(count, size, len(starts))
    high = min(size, max(1, _TILE // size))
    deep = max(1, _TILE // (high * size))
    buffers = torch.empty(2, deep * high * size)
    for top in range(0, size, high):
        band = slice(top, min(size, top + high))
        gaussian = base(band)[:, order]
        own = place[band].expand(count, 1, -1).transpose(1, 2)
        for start in range(0, count, deep):
            some = slice(start, min(count, start + deep))
            shape = (some.stop - some.start, *gaussian.shape)
            scores, work = (buffer[: shape[0] * gaussian.numel()].view(shape) for buffer in buffers)
            torch.mul(gaussian, critics.gain[some], out=scores)
            scores.baddbmm_(rows[0][some, :, band].transpose(1, 2), rows[1][some])
            bend(scores, None, work)
            true[some, band] = scores.gather(2, own[some])[:, :, 0]
            if bool((clip[some] < torch.inf).any()):
                torch.clamp(scores, -clip[some], clip[some], out=scores)
            sums = np.add.reduceat(scores.exp_().numpy(), starts, axis=2)
            by_utterance[some, band] = torch.from_numpy(sums)
    return PairSums(true, true.clamp(-clip[:, :, 0], clip[:, :, 0]).exp(), by_utterance)
