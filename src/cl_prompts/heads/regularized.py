"""A covariance with a share of the identity, so that it can be inverted."""

from __future__ import annotations

from torch import Tensor


def regularize(covariance: Tensor, spherical: float, floor: float) -> Tensor:
    """(1 - g) S + g * mean variance * identity: Friedman, "Regularized Discriminant Analysis", JASA 1989.

    Args:
        covariance: S, float64 [D, D]. It is not changed.
        spherical: g.
        floor: smallest mean variance of the identity's share.
    """
    variance = float(covariance.diagonal().mean())
    regularized = (1 - spherical) * covariance
    regularized.diagonal().add_(spherical * max(variance, floor))
    return regularized
