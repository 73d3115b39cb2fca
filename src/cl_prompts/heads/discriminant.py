"""Regularized discriminant analysis on class Gaussians (Friedman, JASA 1989): the Bayes rule for Gaussian classes.

With one covariance for all classes it is linear discriminant analysis. With a share of each class's own covariance it is
what FeCAM (Goswami et al., NeurIPS 2023) proposes for frozen features; here features may be prompted, with drift
compensation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.drift import fit_map
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead


class DiscriminantClassifier(FeatureClassifier):
    """Logits log N(x; mean_c, S_c), with equal priors, up to a term that is the same for all classes.

    Regularized discriminant analysis, Friedman, "Regularized Discriminant Analysis", JASA 1989; on features of frozen
    backbones FeCAM, Goswami et al., NeurIPS 2023.

    Args:
        width: size D of the features.
        kind: of `ClassGaussians`: "full", "shared" or "diagonal".
        drift: how the statistics of old classes follow the features: "none", "shift" or "affine" (`fit_map`).
        own: weight of a class's own covariance, as in `ClassGaussians.covariances`.
        spherical: weight of a multiple of the identity, as in `ClassGaussians.covariances`.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self, width: int, *, kind: str = "full", drift: str = "affine", own: float = 0.1, spherical: float = 0.1
    ) -> None:
        super().__init__(save_statistics=True, drift=drift)  # answers need them
        if kind == "centroids":
            raise ValueError('kind="centroids": a discriminant has one Gaussian a class; choose full, shared or diagonal')
        self.gaussians = ClassGaussians(width, kind)
        self.own, self.spherical = own, spherical
        # Tensors of the Gaussians, their versions, and the factors computed from them; replaced as a whole by one
        # assignment, so that several threads may ask at once.
        self._cached: tuple[tuple[Tensor, ...], list[int], tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the cached factors: the tensors of a copy have other versions."""
        return {**self.__dict__, "_cached": None}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._cached = None
        super()._load_from_state_dict(*args)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add rows for the task's classes."""
        super().begin_task(class_indices)
        self.gaussians.begin_task(class_indices)

    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        if before is not None and self.needs_before and int(self.fitted):
            self.gaussians.move(fit_map(before, features, self.drift))
        self.gaussians.add(features, targets)
        self._cached = None

    def forward(self, features: Tensor) -> Tensor:
        """Log densities [B, C] of `features` [B, D].

        Raises:
            ValueError: no task has been fitted, or a covariance cannot be inverted.
        """
        self.check_fitted()
        center, precisions, linear, constant, class_indices = self._factors()
        x = features.float() - center
        quadratic = torch.einsum("bd,rde,be->br", x, precisions, x) if precisions.shape[0] > 1 else 0.0
        scores = x @ linear.T + constant - 0.5 * quadratic
        logits = scores.new_full((x.shape[0], self.num_classes), float("-inf"))
        # A class with several Gaussians has the density of the likeliest one.
        return logits.scatter_reduce(1, class_indices.expand(x.shape[0], -1), scores, "amax")

    def _factors(self) -> tuple[Tensor, ...]:
        """The result of `_compute_factors`, which is computed again only after the Gaussians have changed."""
        cached = self._cached
        if cached is not None and torch.compiler.is_exporting():  # as left by the newest answer outside of the graph
            return cached[2]
        tensors = (self.gaussians.mean, self.gaussians.spread)
        versions = [tensor._version for tensor in tensors]
        if (
            cached is None
            or cached[1] != versions
            or any(old is not new for old, new in zip(cached[0], tensors, strict=True))
        ):
            cached = self._cached = (tensors, versions, self._compute_factors())
        return cached[2]

    @torch.no_grad()
    def _compute_factors(self) -> tuple[Tensor, ...]:
        """The terms of the log densities, for features relative to the mean of the class means, so that float32 is enough.

        Returns:
            mean of the class means [D]; precisions [rows, D, D], or [1, D, D] if shared; linear terms [rows, D]; constants
            [rows]; class indices [rows].
        """
        home = self.gaussians.mean.device
        g = copy.deepcopy(self.gaussians).cpu() if home.type == "mps" else self.gaussians  # mps has no float64
        rows = g.seen
        means = g.mean[rows, 0].double()
        center = means.mean(0)
        means = means - center
        factors, failed = torch.linalg.cholesky_ex(g.covariances(self.own, self.spherical))
        if failed.any():
            raise ValueError(
                f"a class's covariance cannot be inverted with own={self.own}, spherical={self.spherical}, because it has "
                "too few images: choose a smaller own_covariance, or a larger spherical_covariance"
            )
        precisions = torch.cholesky_inverse(factors)
        linear = torch.einsum("rde,re->rd", precisions.expand(len(rows), -1, -1), means)
        log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = -0.5 * (linear * means).sum(1) - log_volume
        class_indices = torch.tensor([g.class_indices[row] for row in rows], device=means.device)
        computed = (center.float(), precisions.float(), linear.float(), constant.float(), class_indices)
        return tuple(part.to(home) for part in computed)
