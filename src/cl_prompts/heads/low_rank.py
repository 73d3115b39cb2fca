"""Covariances of low rank beside a pooled one: what is kept of a class, and its density by Woodbury's identity."""

from __future__ import annotations

import torch
from torch import Tensor


# Share of a class's variance, relative to the pooled covariance, beyond which no direction is kept.
EXPLAINED = 0.95


def leading_factor(centered: Tensor, root: Tensor, rank: int) -> tuple[Tensor, float]:
    """Factor F and share of the pooled covariance such that F'F + share * pooled is about the covariance of a class.

    The directions are the eigenvectors of the class's covariance relative to the pooled one (in coordinates in which that
    is the identity) with the largest eigenvalues: the fewest that explain 95 % of the variance, but at most `rank`. They
    are combinations of the images, so drift moves them exactly: F -> F A. The share keeps the variance that is left.

    Args:
        centered: features of the class's n images minus their mean [n, D], float64.
        root: Cholesky factor of the regularized pooled covariance [D, D], float64.
        rank: largest number of directions r.

    Returns:
        F [r, D], zeros after the directions that are kept, and the share. With less than two images F is zero and the
        share 1.
    """
    images, width = centered.shape
    factor = centered.new_zeros(rank, width)
    if images < 2:
        return factor, 1.0
    relative = torch.linalg.solve_triangular(root, centered.T, upper=False) / (images - 1) ** 0.5  # [D, n]
    if images <= width:
        values, vectors = torch.linalg.eigh(relative.T @ relative)
    else:
        values, vectors = torch.linalg.eigh(relative @ relative.T)
        vectors = relative.T @ vectors / values.clamp_min(1e-300).sqrt()
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # largest first
    total = values.sum()
    explained = values.cumsum(0) - values  # by the directions before
    kept = min(rank, int(((explained < EXPLAINED * total) & (values > 1e-12 * total)).sum()))
    factor[:kept] = vectors[:, :kept].T @ centered / (images - 1) ** 0.5
    return factor, float((total - values[:kept].sum()) / width)
