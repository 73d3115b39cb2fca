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

from cl_prompts.heads.regularized import cholesky


KINDS = ("none", "shift", "affine")


# Candidates for the ridge of the map, in units of n * mean variance.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT_EVERY = 5
# Images at a time.
PART = 128


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
    rows = torch.arange(len(before), device=before.device)
    candidates = [None] if kind == "shift" else [ridge] if ridge is not None else list(RIDGES)
    held = rows % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    chosen, explained = 0.1 if len(candidates) > 1 else candidates[0], math.nan
    if len(before) >= 2 * HELD_OUT_EVERY:
        regression = _Regression(before, after, rows[~held])
        change = regression.error(before, after, rows[held], unchanged=True)
        if change:
            errors = [regression.error(before, after, rows[held], each) for each in candidates]
            chosen, explained = candidates[errors.index(min(errors))], 1 - min(errors) / change
        del regression  # before there is another one
    regression = _Regression(before, after, rows)
    if chosen is None:
        matrix = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    else:
        matrix = regression.solve(chosen)
        matrix.diagonal().add_(1)
    return FeatureMap(matrix, regression.end - regression.start @ matrix, chosen, explained)


class _Regression:
    """Ridge regression of the change of features of some images.

    Few images at a time are in float64: copies of all would take more memory than the matrices.

    Args:
        before: features of images before the task [n, D].
        after: features of the same images after it [n, D].
        rows: numbers of the images to use [m].
    """

    def __init__(self, before: Tensor, after: Tensor, rows: Tensor) -> None:
        images, width = len(rows), before.shape[1]
        self.start, self.end = before.new_zeros(2, width, dtype=torch.float64)
        for part in rows.split(PART):
            self.start += before[part].double().sum(0) / images
            self.end += after[part].double().sum(0) / images
        self.gram, self.cross = before.new_zeros(2, width, width, dtype=torch.float64)
        for part in rows.split(PART):
            x = before[part].double() - self.start
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, after[part].double() - self.end - x)
        self.scale = float(self.gram.diagonal().mean())  # n * mean variance

    def solve(self, ridge: float) -> Tensor:
        """A - I [D, D]."""
        regularized = self.gram.clone()
        regularized.diagonal().add_(max(ridge * self.scale, 1e-12))
        return torch.cholesky_solve(self.cross, cholesky(regularized))

    def error(
        self, before: Tensor, after: Tensor, rows: Tensor, ridge: float | None = None, *, unchanged: bool = False
    ) -> float:
        """Sum of squares of what the map misses for images of these rows; without a ridge they are shifted.

        Args:
            before: features of images before the task [n, D].
            after: features of the same images after it [n, D].
            rows: numbers of the images [m].
            ridge: of the map.
            unchanged: of the identity instead of the map.
        """
        matrix, total = None if ridge is None else self.solve(ridge), 0.0
        for part in rows.split(PART):
            x, missed = before[part].double(), after[part].double()
            if unchanged:
                missed -= x
            else:
                x -= self.start
                missed -= self.end + x if matrix is None else self.end + x + x @ matrix
            total += float(missed.square().sum())
        return total
