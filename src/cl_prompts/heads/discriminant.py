"""Regularised discriminant analysis on class Gaussians (Friedman, JASA 1989): the Bayes rule for Gaussian classes.

With one covariance for all classes it is linear discriminant analysis; with a share of each class's own it is what
FeCAM (Goswami et al., NeurIPS 2023) proposes for frozen features, here on prompted ones whose drift is compensated.
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
    """log N(x; mean_c, S_c) with equal priors, up to a number that all classes share, as logits.

    Regularised discriminant analysis, Friedman, "Regularized Discriminant Analysis", JASA 1989; on features of frozen
    backbones FeCAM, Goswami et al., NeurIPS 2023.

    Args:
        width: size D of the features.
        kind: of `ClassGaussians`: "full", "shared" or "diagonal".
        drift: "none", "shift" or "affine": how statistics of old classes follow the features (`fit_map`).
        own: how far a class's covariance is its own, as in `ClassGaussians.covariances`.
        spherical: how far it is shrunk to a multiple of the identity, likewise.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(
        self, width: int, *, kind: str = "full", drift: str = "affine", own: float = 0.1, spherical: float = 0.1
    ) -> None:
        super().__init__(save_statistics=True, drift=drift)  # they are what it answers from
        if kind == "centroids":
            raise ValueError('kind="centroids": a discriminant has one Gaussian a class; choose full, shared or diagonal')
        self.gaussians = ClassGaussians(width, kind)
        self.own, self.spherical = own, spherical
        self._made: tuple[tuple[Tensor, ...], list[int], tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what was made: a copy's tensors count their versions anew."""
        return {**self.__dict__, "_made": None}

    def begin_task(self, columns: Sequence[int]) -> None:
        """Open rows for the task's classes."""
        super().begin_task(columns)
        self.gaussians.begin_task(columns)

    def _fit(self, features: Tensor, columns: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        if before is not None and self.needs_before and int(self.fitted):
            self.gaussians.move(fit_map(before, features, self.drift))
        self.gaussians.add(features, columns)

    def forward(self, features: Tensor) -> Tensor:
        """Log densities, [B, C].

        Raises:
            ValueError: a covariance cannot be inverted.
        """
        self.check_fitted()
        centre, precisions, linear, constant, columns = self._parts()
        x = features.float() - centre
        quadratic = torch.einsum("bd,rde,be->br", x, precisions, x) if len(precisions) > 1 else 0.0
        scores = x @ linear.T + constant - 0.5 * quadratic
        logits = scores.new_full((len(x), self.num_classes), float("-inf"))
        if len(set(columns.tolist())) == len(columns):
            logits[:, columns] = scores
            return logits
        # A class that came back is as likely as its likeliest visit.
        return logits.scatter_reduce(1, columns.expand(len(x), -1), scores, "amax")

    def _parts(self) -> tuple[Tensor, ...]:
        """Made anew when the Gaussians have changed: see `_make`."""
        tensors = (self.gaussians.mean, self.gaussians.spread)
        versions = [tensor._version for tensor in tensors]
        made = self._made
        if made is None or made[1] != versions or any(old is not new for old, new in zip(made[0], tensors, strict=True)):
            made = self._made = (tensors, versions, self._make())
        return made[2]

    @torch.no_grad()
    def _make(self) -> tuple[Tensor, ...]:
        """Mean of the means [D], about which all is taken so that float32 does; precisions [rows, D, D], or one if shared;
        linear terms [rows, D]; constants [rows]; head columns [rows].
        """
        home = self.gaussians.mean.device
        g = copy.deepcopy(self.gaussians).cpu() if home.type == "mps" else self.gaussians  # which has no float64
        rows = g.seen
        means = g.mean[rows, 0].double()
        centre = means.mean(0)
        means = means - centre
        factors, failed = torch.linalg.cholesky_ex(g.covariances(self.own, self.spherical))
        if failed.any():
            raise ValueError(
                f"a class's covariance cannot be inverted with own={self.own}, spherical={self.spherical}: it has too few "
                "images for that; choose a smaller own_covariance, or a larger spherical_covariance"
            )
        precisions = torch.cholesky_inverse(factors)
        linear = torch.einsum("rde,re->rd", precisions.expand(len(rows), -1, -1), means)
        log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = -0.5 * (linear * means).sum(1) - log_volume
        columns = torch.tensor([g.columns[row] for row in rows], device=means.device)
        made = (centre.float(), precisions.float(), linear.float(), constant.float(), columns)
        return tuple(part.to(home) for part in made)
