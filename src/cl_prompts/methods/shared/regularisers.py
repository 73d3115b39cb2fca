"""Loss terms on prompts, keys and selections that any pool can use (`diversity_weight` and the like of a config).

Letters in shapes: L groups (layers), M prompts of a group, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.methods.shared.selection import normalized
from cl_prompts.runtime.distributed import gather_with_gradient


def orthogonality(vectors: Tensor) -> Tensor:
    """CODA-Prompt's penalty mean((X X^T - I)^2), summed over groups, for X = `vectors` [L, M, n]: a scalar."""
    identity = torch.eye(vectors.shape[1], device=vectors.device, dtype=vectors.dtype)
    return (vectors @ vectors.mT - identity).square().mean((1, 2)).sum()


def diversity(prompts: Tensor) -> Tensor:
    """Mean squared cosine between different prompts of a group, for `prompts` [L, M, n], averaged over groups: a scalar.

    0 when they are orthogonal, 1 when they have collapsed onto one direction; unlike `orthogonality`, blind to length.
    """
    count = prompts.shape[1]
    if count < 2:
        return prompts.sum() * 0
    unit = normalized(prompts)
    # X X^T and X^T X have one sum of squares; the smaller one is made, so that a large pool costs no [M, M].
    gram = unit @ unit.mT if count <= unit.shape[2] else unit.mT @ unit
    return (gram.square().sum((1, 2)) - count).mean() / (count * (count - 1))


def alignment(prompts: Tensor, keys: Tensor) -> Tensor:
    """Mean of 1 - cosine between each prompt's mean row and its key, a scalar.

    For `prompts` [L, M, rows, D] and `keys` [L or 1, M, D].
    """
    return 1 - (normalized(prompts.mean(2)) * normalized(keys)).sum(-1).mean()


def collapse(scores: Tensor, counted: Tensor) -> Tensor:
    """log M - entropy of the mean selection softmax(scores) over the global batch's images, a scalar: 0 when spread evenly.

    Args:
        scores: [B, ..., M]; further axes (layers, heads) are averaged over.
        counted: True for real images [B].
    """
    real = counted.view(-1, *[1] * (scores.dim() - 1))
    p = torch.where(real, scores.float(), 0.0).softmax(-1) * real  # padding may hold anything, and 0 * nan is no number
    everywhere = gather_with_gradient(p)
    images = gather_with_gradient(counted.float()[:, None]).sum().clamp_min(1)
    mean = everywhere.sum(0) / images
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum(-1)
    return (torch.log(torch.tensor(float(scores.shape[-1]))) - entropy).mean()
