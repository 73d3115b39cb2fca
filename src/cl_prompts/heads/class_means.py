"""Sums and means of features by class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
