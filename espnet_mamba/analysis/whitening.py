"""Features on a common scale, set by the training part: standardised, or principal components, whitened.

Every estimator sees features after one of these, so that neither a layer's scale nor an offset can change its value.
F frames, D width, K components kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("standardise", "pca")
_ZERO_SPREAD = 1e-6


@dataclass(frozen=True)
class Scaler:
    """An affine map (F, D) -> (F, K): ``mean`` (D,), ``matrix`` (D,) of factors or (D, K) of columns.

    ``explained`` is the share of the training variance (after standardising) that the K components hold, 1 without PCA.
    """

    mean: Tensor
    matrix: Tensor
    explained: float = 1.0

    def __call__(self, features: Tensor) -> Tensor:
        """Map features (F, D) to float32 (F, K)."""
        centred = features.float() - self.mean
        return centred * self.matrix if self.matrix.dim() == 1 else centred @ self.matrix


def fit_scaler(train: Tensor, kind: str = "standardise", components: int | None = None) -> Scaler:
    """Fit a scaler to training frames (F, D).

    ``standardise`` gives each dimension mean 0 and deviation 1; a constant dimension becomes 0. ``pca`` then rotates to
    at most ``components`` principal components (all when None) and gives each deviation 1; directions without variance
    are left out, so with fewer frames than dimensions at most F - 1 components remain, and what is estimated later is
    about those. ValueError for an unknown kind, a number of components below 1, or fewer than 2 frames.
    """
    if kind not in KINDS:
        raise ValueError(f"whitening: {kind!r} is not one of: {' '.join(KINDS)}")
    if components is not None and components < 1:
        raise ValueError(f"components: {components} given, at least 1 expected")
    if len(train) < 2:
        raise ValueError(f"whitening: {len(train)} frames have no spread; give at least 2")
    spread, mean = torch.std_mean(train.double(), dim=0)
    constant = spread <= _ZERO_SPREAD * mean.abs().clamp(min=_ZERO_SPREAD)
    factor = torch.where(constant, 0.0, 1.0 / spread)
    if kind == "standardise":
        return Scaler(mean.float(), factor.float())
    scaled = (train.double() - mean) * factor
    variances, axes = torch.linalg.eigh(scaled.T @ scaled / (len(train) - 1))
    order = torch.arange(len(variances) - 1, -1, -1)
    # Rounding leaves an eigenvalue of a direction without variance a little off zero; blown up it would be noise.
    order = order[variances[order] > 1e-6 * variances[-1].clamp(min=1e-30)][:components]
    if len(order) == 0:  # constant features: one component of zeros
        return Scaler(mean.float(), torch.zeros(train.shape[1], 1), 0.0)
    axes = _fixed_signs(axes[:, order]) / variances[order].sqrt()
    explained = float(variances[order].sum() / variances.sum())
    return Scaler(mean.float(), (factor[:, None] * axes).float(), explained)


def _fixed_signs(axes: Tensor) -> Tensor:
    """Turn every column so that its largest entry is positive: eigenvectors come with any sign."""
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
