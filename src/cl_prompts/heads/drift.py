"""Drift compensation: where features of old classes went while a new task was learnt.

Training a task changes the features of all images. Those of old tasks are gone, but the current task's are seen before and
after: a map fitted on them carries the statistics of old classes into the new feature space. Semantic Drift Compensation
(Yu et al., CVPR 2020) shifts class means by the drift of nearby images; here one affine map, shrunk towards the identity,
moves means and covariances alike.
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

    With X, Y the centred features, A = I + (X'X + r I)^-1 X'(Y - X), r = `ridge` * n * mean variance of X: least squares
    for the change, shrunk towards none. b maps mean to mean.

    Args:
        before: features of images [n, D], before the task.
        after: features of the same images [n, D], after it.
        kind: "affine", or "shift" for A = I.
        ridge: how much A is shrunk towards the identity.

    Raises:
        ValueError: an unknown kind, or features of other shapes.
    """
    if kind not in KINDS[1:]:
        raise ValueError(f"kind={kind!r}: choose one of {KINDS[1:]}")
    if before.shape != after.shape or not len(before):
        raise ValueError(f"features of the same images are needed, got {list(before.shape)} and {list(after.shape)}")
    before, after = before.double(), after.double()
    start, end = before.mean(0), after.mean(0)
    identity = torch.eye(before.shape[1], dtype=torch.float64, device=before.device)
    matrix = identity
    if kind == "affine":
        x, change = before - start, (after - end) - (before - start)
        size = (ridge * x.square().mean() * len(x)).clamp_min(1e-12)
        matrix = identity + torch.linalg.solve(x.T @ x + size * identity, x.T @ change)
    return FeatureMap(matrix, end - start @ matrix)
