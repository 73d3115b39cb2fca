"""Choosing prompts: scores, top-k, votes. Pure functions shared by the methods.

Letters in shapes: B images, M prompts in the pool, D width, k chosen prompts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.collectives import sum_over_processes


def normalized(vectors: Tensor) -> Tensor:
    """Vectors [..., D] divided by their 2-norm; the squared norm is floored at 1e-12, as in the released L2P code."""
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def cosine_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every query [B, D] with every key [M, D]: [B, M]."""
    return normalized(query) @ normalized(keys).T


def diversified_top_k(scores: Tensor, frequency: Tensor, k: int) -> Tensor:
    """L2P eq. 4: the k prompts with the smallest distance times frequency.

    Args:
        scores: cosines [B, M]; the distance is 1 - cosine.
        frequency: how often each prompt was chosen in earlier tasks [M].
        k: prompts per image.

    Returns:
        ids [B, k]. Prompts never chosen before have product 0; among equal products the nearer prompt wins.
    """
    distance = 1 - scores
    nearest_first = distance.argsort(dim=1, stable=True)
    product = (distance * frequency).gather(1, nearest_first)
    return nearest_first.gather(1, product.argsort(dim=1, stable=True)[:, :k])


def majority_vote(ids: Tensor, pool_size: int, counted: Tensor | None, *, over_processes: bool) -> Tensor:
    """One choice for the whole batch: the k prompts chosen by most images (ties: the lower number).

    Args:
        ids: choice of each image [B, k].
        pool_size: M.
        counted: images that vote [B]; None: all.
        over_processes: count the votes of all processes.

    Returns:
        ids [B, k], all rows equal.
    """
    votes = histogram(ids, pool_size, counted)
    if over_processes:
        votes = sum_over_processes(votes)
    elected = votes.argsort(descending=True, stable=True)[: ids.shape[1]]
    return elected.expand(ids.shape[0], -1)


def histogram(ids: Tensor, size: int, counted: Tensor | None = None) -> Tensor:
    """How often each number occurs: ids [B, ..., k] -> int64 [..., size], over images and choices."""
    ones = torch.ones_like(ids)
    if counted is not None:
        ones = ones * counted.view(-1, *[1] * (ids.dim() - 1))
    per_image = torch.zeros(*ids.shape[:-1], size, dtype=torch.int64, device=ids.device)
    return per_image.scatter_add_(-1, ids, ones).sum(0)


def route(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of scores [B, M] and their softmax among themselves: ids [B, k], weights [B, k]."""
    best, ids = scores.topk(k, dim=1)
    return ids, best.softmax(dim=1)
