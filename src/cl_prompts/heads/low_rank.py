"""Covariances of low rank beside a pooled one: what is kept of a class."""

from __future__ import annotations

import torch
from torch import Tensor


# Share of a class's variance, relative to the pooled covariance, beyond which no direction is kept.
EXPLAINED = 0.95
# Number of images that the pooled covariance counts for in that of a class.
PRIOR_IMAGES = 10
# Of the directions that are kept of a class by default: their number, and that of their components (48 kB in float32).
MOST_DIRECTIONS, MOST_COMPONENTS = 32, 12_288


def default_rank(width: int) -> int:
    """Directions of a class for features of size `width`: 32 up to a width of 384, 16 for 768."""
    return max(1, min(MOST_DIRECTIONS, MOST_COMPONENTS // width))


def prior_weight(images: int) -> float:
    """Weight of the pooled covariance in that of a class of so many images."""
    return PRIOR_IMAGES / (PRIOR_IMAGES + images - 1)


def leading_factor(
    centered: Tensor, root: Tensor, rank: int, *, images: int | None = None, left_out: float = 0.0
) -> tuple[Tensor, float]:
    """Factor F and share of the pooled covariance such that F'F + share * pooled is about the covariance of a class.

    The directions are the eigenvectors of the class's covariance relative to the pooled one (in coordinates in which that
    is the identity) with the largest eigenvalues: the fewest that explain 95 % of the variance, but at most `rank`. They
    are combinations of the images, so drift moves them exactly: F -> F A. The share keeps the variance that is left.

    The covariance of few images is shrunk towards the pooled one, as by an inverse Wishart prior around it: of n images,
    the pooled one gets the weight 10 / (n + 9). One image has no covariance of its own: F is zero and the share 1. Ours;
    the number is chosen on held-out images.

    Args:
        centered: features of the class's n images minus their mean [n, D], float64.
        root: Cholesky factor of the regularized pooled covariance [D, D], float64.
        rank: largest number of directions r.
        images: number of images, if `centered` has other rows with the same sum of squares.
        left_out: further sum of squares of the images, as a multiple of the pooled covariance.

    Returns:
        F [r, D], zeros after the directions that are kept, and the share.
    """
    rows, width = centered.shape
    images = rows if images is None else images
    factor = centered.new_zeros(rank, width)
    if images < 2:
        return factor, 1.0
    relative = torch.linalg.solve_triangular(root, centered.T, upper=False).div_((images - 1) ** 0.5)  # [D, n]
    if rows <= width:
        values, vectors = torch.linalg.eigh(relative.T @ relative)
    else:
        values, vectors = torch.linalg.eigh(relative @ relative.T)
        vectors = relative.T @ vectors / values.clamp_min(1e-300).sqrt()
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)  # largest first
    total = values.sum() + left_out * width / (images - 1)
    explained = values.cumsum(0) - values  # by the directions before
    kept = min(rank, int(((explained < EXPLAINED * total) & (values > 1e-12 * total)).sum()))
    prior = prior_weight(images)
    factor[:kept] = ((1 - prior) / (images - 1)) ** 0.5 * (vectors[:, :kept].T @ centered)
    return factor, prior + (1 - prior) * float((total - values[:kept].sum()) / width)
