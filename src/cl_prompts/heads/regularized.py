"""A covariance with a share of the identity, so that it can be inverted, and its Cholesky factor; both in place.

A matrix [D, D] in float64 takes as much memory as the statistics of some 15 classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def regularize(covariance: Tensor, spherical: float, floor: float) -> Tensor:
    """(1 - g) S + g * mean variance * identity: Friedman, "Regularized Discriminant Analysis", JASA 1989.

    Args:
        covariance: S, float64 [D, D]. It is changed, and returned.
        spherical: g.
        floor: smallest mean variance of the identity's share.
    """
    variance = float(covariance.diagonal().mean())
    covariance.mul_(1 - spherical).diagonal().add_(spherical * max(variance, floor))
    return covariance


def cholesky(covariance: Tensor) -> Tensor:
    """The Cholesky factor L [D, D], lower triangular, of L L' = `covariance`.

    Args:
        covariance: contiguous [D, D]. L takes its place.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    # LAPACK works by columns: on the transpose, which is the same matrix, it needs no copy.
    columns, failed = covariance.mT, torch.empty((), dtype=torch.int32, device=covariance.device)
    torch.linalg.cholesky_ex(columns, out=(columns, failed))
    if int(failed):
        raise torch.linalg.LinAlgError(f"the leading minor of order {int(failed)} is not positive")
    return columns


def inverse_of_factor(root: Tensor) -> Tensor:
    """L'^-1 [D, D], upper triangular and contiguous, of a Cholesky factor L, `root` [D, D]."""
    inverse = torch.eye(len(root), dtype=root.dtype, device=root.device)
    torch.linalg.solve_triangular(root, inverse.mT, upper=False, out=inverse.mT)
    return inverse
