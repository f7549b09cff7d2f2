"""The settings of the held-out bounds on mutual information (bounds.py)."""

from __future__ import annotations

from dataclasses import dataclass

from espnet_mamba.analysis.whitening import KINDS

ESTIMATORS = ("dv_heldout", "infonce_heldout", "smile_heldout", "nwj_heldout")


@dataclass(frozen=True)
class BoundSettings:
    """How the held-out critics are trained.

    For the first ``warm_up`` of the steps the DV and NWJ critics learn by InfoNCE too: their own gradient from fresh
    weights is so uneven that at 2 nats a run may stop at half the truth.
    """

    estimators: tuple[str, ...] = ESTIMATORS
    hidden: int = 32  # units of each tower
    embedding: int = 32  # width of the towers' outputs
    steps: int = 200  # optimiser steps
    batch_frames: int = 256  # all pairs of them are scored
    learning_rate: float = 5e-3  # of Adam, to 0 by a cosine
    weight_decay: float = 0.3  # decoupled, times the learning rate
    ema_rate: float = 0.01  # of the running mean in DV's gradient
    smile_clip: float = 5.0  # nats: tau
    warm_up: float = 0.5  # share of the steps
    check_every: int = 50  # steps from one look at the select part to the next
    check_frames: int = 1000  # most frames of the select part
    held_out_frames: int = 4000  # most frames of the held-out part; the ceiling is their logarithm
    seeds: int = 5  # critics per layer and estimator
    select_share: float = 0.2  # share of the utterances that choose the step
    held_out_share: float = 0.3  # share of the utterances that give the value
    resamples: int = 1000  # of the bootstrap over utterances
    whitening: str = "standardise"  # or pca: principal components of the training frames, whitened
    components: int | None = None  # number, of pca; all when None
    block_frames: int = 25  # per utterance: frames in a row that go to one part
    guard_frames: int = 2  # per utterance: frames left out at both ends of a block
    critics_at_once: int = 20  # in one batched product; changes time and memory, not a value

    @property
    def split(self) -> tuple[tuple[float, float], tuple[int, int], tuple[str, int | None]]:
        """Shares and most frames of the select and held-out parts, and (kind, components) of the whitening."""
        shares, most = (self.select_share, self.held_out_share), (self.check_frames, self.held_out_frames)
        return shares, most, (self.whitening, self.components)

    def __post_init__(self) -> None:
        object.__setattr__(self, "estimators", tuple(self.estimators))
        for name in self.estimators:
            if name not in ESTIMATORS:
                raise ValueError(f"estimators: {name!r} is not one of: {' '.join(ESTIMATORS)}")
        if self.whitening not in KINDS:
            raise ValueError(f"whitening: {self.whitening!r} is not one of: {' '.join(KINDS)}")
