"""Draws features from the Gaussians of classes, with the roots of their covariances computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FeatureSampler:
    """Draws mean + scale * root e + factor' e', or mean + deviations * e, with e and e' from a standard normal.

    Args:
        means: [rows, K, D].
        weights: number of images of each cluster [rows, K]; clusters are drawn in proportion.
        class_indices: class index of each row.
        roots: Cholesky factors of the covariances [rows, D, D], or of one for all [1, D, D].
        scales: [rows]; None: 1.
        factors: [rows, r, D]; None: none.
        deviations: standard deviations [rows, K, D], in place of `roots`.
    """

    means: Tensor
    weights: Tensor
    class_indices: Sequence[int]
    roots: Tensor | None = None
    scales: Tensor | None = None
    factors: Tensor | None = None
    deviations: Tensor | None = None

    def by_class(self, images: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw features of one row after another.

        Args:
            images: number per row.
            generator: on the CPU.

        Returns:
            an iterator over features [images, D] in float32, and their class indices [images].
        """
        device, width = self.means.device, self.means.shape[2]
        clusters = torch.multinomial(self.weights.cpu().double(), images, replacement=True, generator=generator).to(device)
        for row, index in enumerate(self.class_indices):
            noise = torch.randn(images, width, generator=generator).to(device)
            if self.deviations is not None:
                noise = noise * self.deviations[row, clusters[row]]
            elif self.roots is not None:
                noise = noise @ self.roots[row if len(self.roots) > 1 else 0].T
            if self.scales is not None:
                noise = noise * self.scales[row]
            if self.factors is not None:
                further = torch.randn(images, self.factors.shape[1], generator=generator).to(device)
                noise = noise + further @ self.factors[row]
            yield self.means[row, clusters[row]] + noise, torch.full((images,), index, device=device)

    def draw(self, images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [rows * images, D] of all rows in float32, and their class indices [rows * images]; as `by_class`."""
        features, targets = zip(*self.by_class(images, generator), strict=True)
        return torch.cat(features), torch.cat(targets)
