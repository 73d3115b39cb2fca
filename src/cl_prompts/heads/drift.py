"""Drift compensation: moves the statistics of old classes to the features after a new task.

Training a task changes the features of all images. Images of old tasks are not available, but those of the current task are
seen before and after its training. A map fitted to their features moves the statistics of old classes. Semantic Drift
Compensation (Yu et al., CVPR 2020) shifts class means by the drift of nearby images; here one affine map, shrunk towards
the identity, moves means and covariances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


KINDS = ("none", "shift", "affine")


@dataclass(frozen=True)
class FeatureMap:
    """x -> x A + b.

    Args:
        matrix: A [D, D], float64.
        shift: b [D], float64.
    """

    matrix: Tensor
    shift: Tensor


def fit_map(before: Tensor, after: Tensor, kind: str = "affine", ridge: float = 0.1) -> FeatureMap:
    """The map from features before a task to features after it. Ours, after Yu et al., CVPR 2020, which moves means only.

    For centered features X and Y, A = I + (X'X + r I)^-1 X'(Y - X) with r = `ridge` * n * mean variance of X: ridge
    regression of the change. b maps the mean of X to that of Y.

    Args:
        before: features of images before the task [n, D].
        after: features of the same images after it [n, D].
        kind: "affine", or "shift" for A = I.
        ridge: strength of the shrinkage of A towards the identity.

    Raises:
        ValueError: an unknown kind, or features of different shapes.
    """
    if kind not in KINDS[1:]:
        raise ValueError(f"kind={kind!r}: choose one of {KINDS[1:]}")
    if before.shape != after.shape or not before.shape[0]:
        raise ValueError(f"features of the same images are needed, got {list(before.shape)} and {list(after.shape)}")
    before, after = before.double(), after.double()
    start, end = before.mean(0), after.mean(0)
    identity = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    matrix = identity
    if kind == "affine":
        x, change = before - start, (after - end) - (before - start)
        size = (ridge * x.square().mean() * x.shape[0]).clamp_min(1e-12)
        matrix = identity + torch.linalg.solve(x.T @ x + size * identity, x.T @ change)
    return FeatureMap(matrix, end - start @ matrix)
