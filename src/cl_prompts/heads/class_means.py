"""Sums and means of features by class, and the cosine of a feature with each mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.runtime.precision import device_of_float64


def class_sums(
    features: Tensor, targets: Tensor, classes: Sequence[int], *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Sum of the features of each of `classes`, and the number of its images.

    The sums are products with a one-hot matrix: unlike those of `index_add_`, they are deterministic on a GPU.

    Args:
        features: [n, D]; rows that are left out may hold anything, NaN included.
        targets: class of each row [n]; rows of other classes, and of padding (-100), are left out.
        classes: the C classes.
        dtype: type of the sums. Apple's devices have no float64.

    Returns:
        sums [C, D] in `dtype`, and counts [C] in int64.
    """
    member = targets[:, None] == torch.tensor(list(classes), dtype=torch.int64, device=targets.device)
    taken = torch.where(member.any(1, keepdim=True), features, 0.0).to(dtype)  # 0 * NaN would be NaN
    return member.T.to(dtype) @ taken, member.sum(0)


def class_means(sums: Tensor, counts: Tensor) -> Tensor:
    """Means [C, D] from the `sums` [C, D] and `counts` [C] of `class_sums`; zeros for a class without images."""
    return sums / counts.clamp_min(1)[:, None]


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
        work = device_of_float64(features.device)
        sums, counts = class_sums(features.to(work), targets.to(work), range(num_classes))
        sums[: len(self.sums)] += self.sums.to(sums.device)
        counts = counts.double()
        counts[: len(self.counts)] += self.counts.to(counts.device)
        self.sums, self.counts = sums, counts

    def cosines(self, features: Tensor) -> Tensor:
        """The cosine of each feature with each class's mean; -inf for classes without an image.

        Args:
            features: [B, D].

        Returns:
            float32 [B, C].
        """
        return cosines(features, self.sums).masked_fill((self.counts == 0).to(features.device), -math.inf)

    def state_dict(self) -> dict[str, Tensor]:
        """`sums` and `counts`."""
        return {"sums": self.sums, "counts": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state` that `state_dict` returned."""
        self.sums, self.counts = state["sums"], state["counts"]


def cosines(features: Tensor, means: Tensor) -> Tensor:
    """Cosine of each feature [B, D] with each mean, or multiple of a mean, [C, D]: [B, C] float32."""
    return F.linear(F.normalize(features.float(), dim=1), F.normalize(means, dim=1).float().to(features.device))
