"""Nearest class mean: running means of each class's features, and the cosine of a feature with each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


class ClassMeans:
    """Sums of the features of each class, in float64, so that neither the order of images nor their batches matter.

    Args:
        width: size D of the features.

    Attributes:
        sums: [C, D] float64.
        counts: number of images of each class [C], float64.
    """

    def __init__(self, width: int) -> None:
        self.sums = torch.zeros(0, width, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.float64)

    @torch.no_grad()
    def add(self, features: Tensor, targets: Tensor, num_classes: int) -> None:
        """Add images.

        Args:
            features: [n, D].
            targets: index of each image's class [n], 0 to `num_classes` - 1.
            num_classes: C, at least as many as before.
        """
        sums = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, device=features.device)
        sums[: len(self.sums)] = self.sums
        sums.index_add_(0, targets, features.double())
        counts = torch.bincount(targets, minlength=num_classes).double()
        counts[: len(self.counts)] += self.counts.to(counts.device)
        self.sums, self.counts = sums, counts

    def cosines(self, features: Tensor) -> Tensor:
        """The cosine of each feature with each class's mean; -inf for classes without an image.

        Args:
            features: [B, D], on the device of the features added.

        Returns:
            float32 [B, C].
        """
        return cosines(features, self.sums).masked_fill(self.counts == 0, -math.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """`sums` and `counts`."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` that `state_dict` returned."""
        self.sums, self.counts = state["sums"], state["counts"]


def cosines(features: Tensor, means: Tensor) -> Tensor:
    """Cosine of each feature [B, D] with each mean, or multiple of a mean, [C, D]: [B, C] float32."""
    return F.linear(F.normalize(features.float(), dim=1), F.normalize(means, dim=1).float())
