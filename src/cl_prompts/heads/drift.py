"""Drift compensation: moves the statistics of old classes to the features after a new task.

Training a task changes the features of all images. Images of old tasks are not available, but those of the current task are
seen before and after its training. A map fitted to their features moves the statistics of old classes. Semantic Drift
Compensation (Yu et al., CVPR 2020) shifts class means by the drift of nearby images; here one affine map, shrunk towards
the identity, moves means and covariances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


KINDS = ("none", "shift", "affine")


# Candidates for the ridge of the map, in units of n * mean variance.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class FeatureMap:
    """x -> x A + b.

    Args:
        matrix: A [D, D], float64.
        shift: b [D], float64.
        ridge: of the regression; None for a shift.
        explained: R^2 of the change of held-out images: 1 - sum |y - xA - b|^2 / sum |y - x|^2. 1: the map explains it, 0:
            no better than leaving old classes where they are. NaN if it is unknown.
    """

    matrix: Tensor
    shift: Tensor
    ridge: float | None = None
    explained: float = math.nan


def fit_map(before: Tensor, after: Tensor, kind: str = "affine", ridge: float | None = None) -> FeatureMap:
    """The map from features before a task to features after it. Ours, after Yu et al., CVPR 2020, which moves means only.

    For centered features X and Y, A = I + (X'X + r I)^-1 X'(Y - X) with r = `ridge` * n * mean variance of X: ridge
    regression of the change. b maps the mean of X to that of Y. Every fifth image is held out to choose the ridge and to
    measure R^2; then all images are used.

    Args:
        before: features of images before the task [n, D].
        after: features of the same images after it [n, D].
        kind: "affine", or "shift" for A = I.
        ridge: strength of the shrinkage of A towards the identity; None: the candidate of `RIDGES` with the smallest error
            on the held-out images, or 0.1 with fewer than ten images.

    Raises:
        ValueError: an unknown kind, or features of different shapes.
    """
    if kind not in KINDS[1:]:
        raise ValueError(f"kind={kind!r}: choose one of {KINDS[1:]}")
    if before.shape != after.shape or not before.shape[0]:
        raise ValueError(f"features of the same images are needed, got {list(before.shape)} and {list(after.shape)}")
    before, after = before.double(), after.double()
    candidates = [None] if kind == "shift" else [ridge] if ridge is not None else list(RIDGES)
    held = torch.zeros(len(before), dtype=torch.bool, device=before.device)
    held[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
    chosen, explained = 0.1 if len(candidates) > 1 else candidates[0], math.nan
    change = float((after[held] - before[held]).square().sum())
    if len(before) >= 2 * HELD_OUT_EVERY and change:
        regression = _Regression(before[~held], after[~held])
        errors = [float((after[held] - regression.predict(before[held], each)).square().sum()) for each in candidates]
        chosen, explained = candidates[errors.index(min(errors))], 1 - min(errors) / change
    regression = _Regression(before, after)
    matrix = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    if chosen is not None:
        matrix += regression.solve(chosen)
    return FeatureMap(matrix, regression.end - regression.start @ matrix, chosen, explained)


class _Regression:
    """Ridge regression of the change of features."""

    def __init__(self, before: Tensor, after: Tensor) -> None:
        self.start, self.end = before.mean(0), after.mean(0)
        x = before - self.start
        self.images, self.variance = len(x), float(x.square().mean())
        self.gram, self.cross = x.T @ x, x.T @ (after - self.end - x)

    def solve(self, ridge: float) -> Tensor:
        """A - I [D, D]."""
        regularized = self.gram.clone()
        regularized.diagonal().add_(max(ridge * self.images * self.variance, 1e-12))
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regularized))

    def predict(self, features: Tensor, ridge: float | None) -> Tensor:
        """Features after the task of images before it; without a ridge they are shifted."""
        moved = features - self.start
        return self.end + (moved if ridge is None else moved + moved @ self.solve(ridge))
