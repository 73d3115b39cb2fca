"""Log densities of Gaussians, up to a term that is the same for all, from terms that are computed once.

Features are taken relative to the mean of the class means, so that float32 is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cl_prompts.heads.regularized import cholesky, inverse_of_factor


TINY = 1e-30
SHORTEST = 1e-3  # squared length per dimension, of features at the center
AT_ONCE = 8  # Gaussians whose factors are in float64 at a time
BY_ROW = ("shares", "means", "offsets", "constant", "lengths")  # of `LowRankDensities`, beside the directions


@dataclass(frozen=True)
class FullDensities:
    """log N(x; mean_c, S_c) for R Gaussians with covariances of their own, or one for all.

    Args:
        center: mean of the means [D].
        precisions: [R, D, D], or [1, D, D] for one covariance.
        linear: [R, D].
        constant: [R].
        lengths: m'Pm for the mean m and the precision P of each Gaussian [R].
        metric: mean of the precisions [D, D].
    """

    center: Tensor
    precisions: Tensor
    linear: Tensor
    constant: Tensor
    lengths: Tensor
    metric: Tensor

    @classmethod
    def of(cls, means: Tensor, covariances: Iterable[Tensor]) -> FullDensities:
        """Compute the terms; no more than one covariance is held in float64.

        Args:
            means: float64 [R, D].
            covariances: float64 [D, D] each, or one for all.

        Raises:
            torch.linalg.LinAlgError: a covariance cannot be inverted.
        """
        center = means.mean(0)
        means = means - center
        precisions, linear, volumes = [], [], []
        for row, covariance in enumerate(covariances):
            root = torch.linalg.cholesky(covariance)
            precision = torch.cholesky_inverse(root)
            precisions.append(precision.float())
            linear.append(means[row] @ precision)
            volumes.append(root.diagonal().log().sum())
        own = means @ precision if len(precisions) == 1 else torch.stack(linear)
        lengths = (own * means).sum(1)
        constant = -0.5 * lengths - torch.stack(volumes)
        stacked = torch.stack(precisions)
        return cls(center.float(), stacked, own.float(), constant.float(), lengths.float(), stacked.mean(0))

    def scores(self, features: Tensor) -> Tensor:
        """Log densities [B, R] of features [B, D]."""
        x = features - self.center
        quadratic = torch.einsum("bd,rde,be->br", x, self.precisions, x) if self.precisions.shape[0] > 1 else 0.0
        return x @ self.linear.T + self.constant - 0.5 * quadratic

    def cosines(self, features: Tensor) -> Tensor:
        """Cosine of each feature [B, D] and each mean, by the metric of the Gaussian's precision: [B, R].

        Both are taken relative to the mean of the means; 0 for a mean that is there itself.
        """
        x = features - self.center
        squares = torch.einsum("bd,rde,be->br", x, self.precisions, x)
        return x @ self.linear.T * (squares * self.lengths).clamp_min(TINY).rsqrt()

    def squared_lengths(self, features: Tensor) -> Tensor:
        """Squared length of features [B, D] per dimension, from the mean of the means and by the mean precision: [B]."""
        x = features - self.center
        return ((x @ self.metric) * x).mean(1).clamp_min(SHORTEST)


def squared_lengths(z: Tensor) -> Tensor:
    """Squared length of each of z [B, D] per dimension: [B]."""
    return z.square().mean(1).clamp_min(SHORTEST)


@dataclass(frozen=True)
class LowRankDensities:
    """log N(x; mean_c, share_c * P + own * F_c'F_c) for R Gaussians, by Woodbury's identity.

    With z = x L'^-1 for P = L L', the distance is |z - m|^2 / share - |G (z - m)|^2, where the rows of G are orthogonal.
    It takes B * D^2 + B * R * (r + 1) * D products, and no more memory than the factors.

    Args:
        center: mean of the means [D].
        whiten: L'^-1 [D, D].
        shares: [R].
        means: m / share [R, D].
        directions: G of all Gaussians [R * r, D].
        offsets: G m [R * r].
        constant: [R].
        lengths: |m|^2 [R].
    """

    center: Tensor
    whiten: Tensor
    shares: Tensor
    means: Tensor
    directions: Tensor
    offsets: Tensor
    constant: Tensor
    lengths: Tensor

    @classmethod
    def joined(cls, parts: Iterable[LowRankDensities], rows: int) -> LowRankDensities:
        """All densities of `in_parts`; `rows` is R. The directions of the parts are not held beside all of them.

        Raises:
            torch.linalg.LinAlgError: P cannot be inverted.
        """
        kept: list[LowRankDensities] = []
        directions, done = torch.empty(0), 0
        for part in parts:
            number, width = part.directions.shape
            if not kept:
                directions = part.directions.new_empty(rows * number // len(part.shares), width)
            own = directions[done : done + number].copy_(part.directions)
            kept.append(replace(part, directions=own))
            done += number
        return replace(
            kept[0], directions=directions, **{name: torch.cat([getattr(part, name) for part in kept]) for name in BY_ROW}
        )

    @classmethod
    def in_parts(
        cls, means: Tensor, pooled: Tensor, shares: Tensor, factors: Tensor, own: float
    ) -> Iterator[LowRankDensities]:
        """The terms of `AT_ONCE` Gaussians after another: for all of them in float64, twice the memory would be needed.

        Args:
            means: float64 [R, D].
            pooled: P, float64 [D, D]. It is changed.
            shares: float64 [R].
            factors: F_c, float32 [R, r, D].
            own: weight of F_c'F_c.

        Raises:
            torch.linalg.LinAlgError: P cannot be inverted.
        """
        center = means.mean(0)
        whiten = inverse_of_factor(cholesky(pooled))
        del pooled
        of_all = center.float(), whiten.float()
        parts = [tensor.split(AT_ONCE) for tensor in (means, shares, factors)]
        for mean, share, factor in zip(*parts, strict=True):
            scaled = ((mean - center) @ whiten).float()
            relative = factor.double() @ whiten
            values, vectors = torch.linalg.eigh(relative @ relative.mT)
            stretched = 1 + own * values.clamp_min(0) / share[:, None]
            weights = (own / stretched).sqrt() / share[:, None]
            relative = vectors.mT @ relative
            directions = relative.mul_(weights[:, :, None]).float().flatten(0, 1)
            del relative
            volumes = 0.5 * (stretched.log().sum(1) + means.shape[1] * share.log())
            short, lengths = share.float(), scaled.square().sum(1)
            constant = -0.5 * lengths / short - volumes.float()
            offsets = torch.einsum("rkd,rd->rk", directions.view_as(factor), scaled).flatten()
            yield cls(*of_all, short, scaled / short[:, None], directions, offsets, constant, lengths)

    def whitened(self, features: Tensor) -> Tensor:
        """z of features [B, D]: relative to the mean of the means, where the pooled covariance is the identity: [B, D]."""
        return (features - self.center) @ self.whiten

    def scores(self, features: Tensor) -> Tensor:
        """Log densities [B, R] of features [B, D]."""
        return self.scores_of(self.whitened(features))

    def scores_of(self, z: Tensor) -> Tensor:
        """Log densities [B, R] of `whitened` features z [B, D]."""
        along = (z @ self.directions.T - self.offsets).square().unflatten(1, (len(self.shares), -1)).sum(2)
        return z @ self.means.T - 0.5 * z.square().sum(1, keepdim=True) / self.shares + self.constant + 0.5 * along

    def cosines(self, features: Tensor) -> Tensor:
        """Cosine of each feature [B, D] and each mean where the pooled covariance is the identity: [B, R].

        Both are taken relative to the mean of the means; 0 for a mean that is there itself.
        """
        return self.cosines_of(self.whitened(features))

    def cosines_of(self, z: Tensor) -> Tensor:
        """As `cosines`, of `whitened` features z [B, D]."""
        squares = z.square().sum(1, keepdim=True) * self.lengths
        return z @ self.means.T * self.shares * squares.clamp_min(TINY).rsqrt()

    def squared_lengths(self, features: Tensor) -> Tensor:
        """Squared length of features [B, D] per dimension, where the pooled covariance is the identity: [B]."""
        return squared_lengths(self.whitened(features))
