"""Loss terms on prompts, keys and selections, for any pool (`diversity_weight` and the like in a config).

Letters in shapes: L groups (layers), M prompts of a group, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_prompts.methods.shared.selection import normalized
from cl_prompts.runtime.distributed import sum_over_processes, sum_with_gradient


def orthogonality(vectors: Tensor, weights: Tensor | None = None) -> Tensor:
    """CODA-Prompt's penalty mean(W * (X X^T - I)^2), summed over groups, for X = `vectors` [L, M, n]: a scalar.

    W are `weights` of the pairs of vectors [M, M]; None: 1.
    """
    identity = torch.eye(vectors.shape[1], device=vectors.device, dtype=vectors.dtype)
    squares = (vectors @ vectors.mT - identity).square()
    return (squares if weights is None else weights * squares).mean((1, 2)).sum()


def separation(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared covariance between each row of `first` [n, D] and each of `second` [m, D], over their D numbers."""
    first, second = (rows - rows.mean(1, keepdim=True) for rows in (first, second))
    return (first @ second.T / first.shape[1]).square().mean()


def diversity(prompts: Tensor) -> Tensor:
    """Mean squared cosine between different prompts of a group, for `prompts` [L, M, n], averaged over groups: a scalar.

    0 if the prompts are orthogonal, 1 if they have one direction. Unlike `orthogonality` it does not depend on their
    length.
    """
    count = prompts.shape[1]
    if count < 2:
        return prompts.sum() * 0
    unit = normalized(prompts)
    # X X^T and X^T X have the same sum of squares. The smaller one is used, so that a large pool needs no [M, M].
    gram = unit @ unit.mT if count <= unit.shape[2] else unit.mT @ unit
    return (gram.square().sum((1, 2)) - count).mean() / (count * (count - 1))


def alignment(prompts: Tensor, keys: Tensor) -> Tensor:
    """Mean of 1 - cosine between each prompt's mean row and its key: a scalar.

    `prompts` are [L, M, rows, D], `keys` [L or 1, M, D].
    """
    return 1 - (normalized(prompts.mean(2)) * normalized(keys)).sum(-1).mean()


def collapse(scores: Tensor, valid: Tensor) -> Tensor:
    """log M - entropy of softmax(scores) averaged over the images of the global batch: a scalar, 0 for an even selection.

    Args:
        scores: [B, ..., M]; the term is averaged over further axes (layers, heads).
        valid: True for real images [B].
    """
    real = valid.view(-1, *[1] * (scores.dim() - 1))
    p = torch.where(real, scores.float(), 0.0).softmax(-1) * real  # padding may hold NaN, and 0 * NaN is NaN
    mean = sum_with_gradient(p.sum(0)) / sum_over_processes(valid.sum()).clamp_min(1)
    entropy = -(mean * mean.clamp_min(1e-12).log()).sum(-1)
    return (math.log(scores.shape[-1]) - entropy).mean()
