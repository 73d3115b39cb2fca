"""Regularized discriminant analysis on class Gaussians (Friedman, JASA 1989): the Bayes rule for Gaussian classes.

With one covariance for all classes it is linear discriminant analysis. With a share of each class's own covariance it is
what FeCAM (Goswami et al., NeurIPS 2023) proposes for frozen features; here features may be prompted, with drift
compensation, and the covariances of low rank.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.base import FeatureClassifier
from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.densities import AT_ONCE, FullDensities, LowRankDensities, squared_lengths
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.regularized import cholesky


@dataclass(frozen=True)
class Densities:
    """Densities of the rows with images, and the class index of each row [R]."""

    rows: FullDensities | LowRankDensities
    class_indices: Tensor


class DiscriminantClassifier(FeatureClassifier):
    """Logits log N(x; mean_c, S_c), with equal priors, up to a term that is the same for all classes.

    Regularized discriminant analysis, Friedman, "Regularized Discriminant Analysis", JASA 1989; on features of frozen
    backbones FeCAM, Goswami et al., NeurIPS 2023.

    Args:
        width: size D of the features.
        kind: of `ClassGaussians`: "low_rank", "full", "shared" or "diagonal".
        drift: how the statistics of old classes follow the features: "none", "shift" or "affine" (`fit_map`).
        own: weight of a class's own covariance, as in `ClassGaussians.covariances`.
        spherical: weight of a multiple of the identity, as in `ClassGaussians.covariances`.
        rank: of `ClassGaussians`, for "low_rank".
        normalize: features pass a layer norm without weights first.

    Raises:
        ValueError: an unknown kind.
    """

    lighter = 'class_covariance="shared", or "low_rank" with a small covariance_rank'
    # Its fits take little time, and more images make the temperature surer.
    held_out_images = 1000

    def __init__(
        self,
        width: int,
        *,
        kind: str = "low_rank",
        drift: str = "affine",
        own: float = 0.1,
        spherical: float = 0.1,
        rank: int | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__(save_statistics=True, drift=drift)  # answers need them
        if kind == "centroids":
            raise ValueError(
                'kind="centroids": a discriminant has one Gaussian a class; choose low_rank, full, shared or diagonal'
            )
        self.gaussians = ClassGaussians(width, kind, rank=rank)
        self.own, self.spherical, self.normalize = own, spherical, normalize
        # Tensors of the Gaussians, their versions, and the densities computed from them; replaced as a whole by one
        # assignment, so that several threads may ask at once.
        self._cached: tuple[tuple[Tensor, ...], list[int], Densities] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Drop the cached factors: the tensors of a copy have other versions."""
        return {**self.__dict__, "_cached": None}

    def forget_computed(self) -> None:
        """Drop the factors."""
        self._cached = None

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget_computed()
        super()._load_from_state_dict(*args)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add rows for the task's classes."""
        self.forget_computed()  # before there is room for further rows
        super().begin_task(class_indices)
        self.gaussians.begin_task(class_indices)

    @property
    def bytes_to_answer(self) -> int:
        """Bytes of the terms of the densities."""
        g = self.gaussians
        rows = len(g.class_indices)
        if g.kind in ("full", "diagonal"):
            return 4 * rows * (g.width**2 + g.width)
        factors = g.factor.shape[1] if g.kind == "low_rank" else 0
        return 4 * g.width * (g.width + rows * (1 + factors))

    def _fit(self, features: Tensor, targets: Tensor, before: Tensor | None, head: IncrementalHead | None) -> None:
        self.forget_computed()
        features = self._normalized(features)
        if before is not None and self.needs_before and int(self.fitted):
            self.gaussians.move(self._map(self._normalized(before), features))
        self.gaussians.add(features, targets)
        self._check_invertible()

    def _normalized(self, features: Tensor) -> Tensor:
        """`features` [n, D] in float32, after a layer norm if the head has one."""
        features = features.float()
        return F.layer_norm(features, features.shape[1:]) if self.normalize else features

    def _group(self, groups: ClassGroups, head: IncrementalHead) -> None:
        self.forget_computed()
        self._check_invertible()

    def _check_invertible(self) -> None:
        """Raise ValueError if a covariance cannot be inverted: at the fit, not at the first answer."""
        g = self.gaussians
        # Of a low-rank covariance only the pooled part can fail.
        try:
            for covariance in [g.pooled(self.spherical)] if g.pools else g.covariances(self.own, self.spherical):
                cholesky(covariance)
        except torch.linalg.LinAlgError as error:
            raise self._not_invertible() from error

    def _not_invertible(self) -> ValueError:
        # Elsewhere the weight of a class's own covariance does not matter.
        other = " or a smaller own_covariance" if self.own and not self.gaussians.pools else ""
        return ValueError(
            f"a class's covariance cannot be inverted with own={self.own}, spherical={self.spherical}, because it has too "
            f"few images, or features do not vary in all directions: choose a larger spherical_covariance{other}"
        )

    def forward(self, features: Tensor) -> Tensor:
        """Log densities [B, C] of `features` [B, D].

        Raises:
            ValueError: no task has been fitted, or a covariance cannot be inverted.
        """
        self.check_fitted()
        densities = self._densities()
        scores = densities.rows.scores(self._normalized(features))
        logits = scores.new_full((scores.shape[0], self.num_classes), float("-inf"))
        # A class with several Gaussians has the density of the likeliest one.
        return logits.scatter_reduce(1, densities.class_indices.expand(scores.shape[0], -1), scores, "amax")

    def novelty(self, features: Tensor) -> Tensor:
        """1 - the largest cosine of each of `features` [B, D] and a class mean, where the covariance is the identity: [B].

        With one class there is nothing to compare: 1 for all.

        Raises:
            ValueError: as `forward`.
        """
        self.check_fitted()
        return 1 - self._densities().rows.cosines(self._normalized(features)).amax(1)

    def scale(self, features: Tensor) -> Tensor:
        """Squared length of each of `features` [B, D] where the covariance is the identity, divided by D: [B].

        Differences of log densities grow with it, whether an image's features vary more than those of others, or the
        covariance is of few images and too small in some directions: the logits divided by it are as sure as they should be
        for both kinds of images.

        Raises:
            ValueError: as `forward`.
        """
        self.check_fitted()
        return self._densities().rows.squared_lengths(self._normalized(features))

    def _answers_once(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As `forward`, `novelty` and `scale`. Of low-rank covariances, no more than a few densities are in memory."""
        g = self.gaussians
        if g.kind != "low_rank":
            return super()._answers_once(features)
        features, indices = self._normalized(features), torch.tensor(g.class_indices, device=features.device)[g.seen]
        logits = features.new_full((len(features), self.num_classes), float("-inf"))
        cosine = features.new_full((len(features),), float("-inf"))
        z = None
        for index, part in zip(indices.split(AT_ONCE), self._parts(g), strict=True):
            z = part.whitened(features) if z is None else z
            logits.scatter_reduce_(1, index.expand(len(features), -1), part.scores_of(z), "amax")
            cosine = torch.maximum(cosine, part.cosines_of(z).amax(1))
        assert z is not None
        return logits, 1 - cosine, squared_lengths(z)

    def _parts(self, g: ClassGaussians) -> Iterator[LowRankDensities]:
        """Densities of the rows with images of low-rank Gaussians, `AT_ONCE` after another."""
        rows = g.seen
        factors = g.factor if len(rows) == len(g.factor) else g.factor[rows]
        means = g.mean[rows, 0].double()
        return LowRankDensities.in_parts(means, g.pooled(self.spherical), g.shares(self.own), factors, self.own)

    def _densities(self) -> Densities:
        """The result of `_compute`, which is computed again only after the Gaussians have changed."""
        cached = self._cached
        if cached is not None and torch.compiler.is_exporting():  # as left by the newest answer outside of the graph
            return cached[2]
        tensors = tuple(self.gaussians.buffers())
        versions = [tensor._version for tensor in tensors]
        if (
            cached is None
            or cached[1] != versions
            or any(old is not new for old, new in zip(cached[0], tensors, strict=True))
        ):
            cached = self._cached = (tensors, versions, self._compute())
        return cached[2]

    @torch.no_grad()
    def _compute(self) -> Densities:
        home = self.gaussians.mean.device
        g = copy.deepcopy(self.gaussians).cpu() if home.type == "mps" else self.gaussians  # mps has no float64
        rows = g.seen
        found: FullDensities | LowRankDensities
        try:
            if g.kind == "low_rank":
                found = LowRankDensities.joined(self._parts(g), len(rows))
            else:
                found = FullDensities.of(g.mean[rows, 0].double(), g.covariances(self.own, self.spherical))
        except torch.linalg.LinAlgError as error:  # statistics of a file whose fit did not check them
            raise self._not_invertible() from error
        moved = replace(found, **{f.name: getattr(found, f.name).to(home) for f in fields(found)})
        return Densities(moved, torch.tensor([g.class_indices[row] for row in rows], device=home))
