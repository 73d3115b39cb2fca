"""Regularised discriminant analysis on class Gaussians (Friedman, JASA 1989): the Bayes rule for Gaussian classes.

With one covariance for all classes it is linear discriminant analysis; with a share of each class's own it is what
FeCAM (Goswami et al., NeurIPS 2023) proposes for frozen features, here on prompted ones whose drift is compensated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_prompts.classifiers.base import FeatureClassifier
from cl_prompts.classifiers.drift import fit_map
from cl_prompts.classifiers.gaussians import ClassGaussians
from cl_prompts.head import GrowingHead


class DiscriminantClassifier(FeatureClassifier):
    """log N(x; mean_c, S_c) with equal priors, as logits.

    Args:
        width: size D of the features.
        kind: of `ClassGaussians`: "full", "shared" or "diagonal".
        drift: "none", "shift" or "affine": how statistics of old classes follow the features (`fit_map`).
        own, spherical: as in `ClassGaussians.covariances`.
    """

    def __init__(
        self, width: int, *, kind: str = "full", drift: str = "affine", own: float = 0.1, spherical: float = 0.1
    ) -> None:
        super().__init__(save_statistics=True)  # they are what it answers from
        self.gaussians = ClassGaussians(width, kind)
        self.drift, self.own, self.spherical = drift, own, spherical
        self._made: tuple[object, tuple[Tensor, ...]] | None = None

    @property
    def needs_before(self) -> bool:
        """For the map."""
        return self.drift != "none"

    def begin_task(self, columns: Sequence[int]) -> None:
        """Open rows for the task's classes."""
        super().begin_task(columns)
        self.gaussians.begin_task(columns)

    def _fit(self, features: Tensor, columns: Tensor, before: Tensor | None, head: GrowingHead | None) -> None:
        if before is not None and self.drift != "none" and int(self.fitted):
            self.gaussians.move(fit_map(before, features, self.drift))
        self.gaussians.add(features, columns)

    def forward(self, features: Tensor) -> Tensor:
        """Log densities, [B, C]."""
        self.check_fitted()
        precisions, linear, constant, columns = self._parts()
        x = features.float()
        quadratic = torch.einsum("bd,rde,be->br", x, precisions, x) if len(precisions) > 1 else 0.0
        scores = x @ linear.T + constant - 0.5 * quadratic
        logits = scores.new_full((len(x), self.num_classes), float("-inf"))
        if len(set(columns.tolist())) == len(columns):
            logits[:, columns] = scores
            return logits
        # A class that came back is as likely as its likeliest visit.
        return logits.scatter_reduce(1, columns.expand(len(x), -1), scores, "amax")

    def _parts(self) -> tuple[Tensor, ...]:
        """Precisions [rows, D, D] (none for one shared covariance), linear terms [rows, D], constants, head columns."""
        g = self.gaussians
        made_from = (g.mean._version, g.spread._version, id(g.mean), g.mean.device)
        if self._made is None or self._made[0] != made_from:
            self._made = (made_from, self._make())
        return self._made[1]

    @torch.no_grad()
    def _make(self) -> tuple[Tensor, ...]:
        g = self.gaussians
        rows = g.seen
        covariances = g.covariances(self.own, self.spherical)
        means = g.mean[rows, 0].double()
        if g.kind == "shared":
            covariances = covariances[:1]
        factors = torch.linalg.cholesky(covariances)
        precisions = torch.cholesky_inverse(factors)
        linear = torch.einsum("rde,re->rd", precisions.expand(len(rows), -1, -1), means)
        log_volume = factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = -0.5 * (linear * means).sum(1) - log_volume
        columns = torch.tensor([g.columns[row] for row in rows], device=means.device)
        return precisions.float(), linear.float(), constant.float(), columns
