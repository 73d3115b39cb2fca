"""Choosing prompts: scores, top-k, votes. Pure functions shared by the methods.

Letters in shapes: B images, M prompts in the pool, D width, k chosen prompts. Scores of at most `CHUNK` prompts are held
together; larger pools are looked through chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_prompts.runtime.distributed import sum_over_processes


CHUNK = 4096


def normalized(vectors: Tensor) -> Tensor:
    """Vectors [..., D] divided by their 2-norm; the squared norm is floored at 1e-12, as in the released L2P code."""
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def cosine_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every `query` [B, D] with each of `keys` [M, D]: [B, M]."""
    return normalized(query) @ normalized(keys).T


def cosine_of(query: Tensor, chosen: Tensor) -> Tensor:
    """Cosine of each query [B, D] with its own chosen keys [B, k, D]: [B, k]."""
    return (normalized(query)[:, None] * normalized(chosen)).sum(2)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Numbers [B, k] of the `k` largest of float32 `scores` [B, M], best first; of equal ones the lower number is first."""
    # torch.topk leaves open which of equal values it takes. So it gets integers in which no two are equal: the float's bits
    # in the order of their values, then the number, counted backwards. Adding 0 turns -0 into 0.
    bits = (scores + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    number = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return (order * 2**32 + number).topk(k, dim=1).indices


@torch.no_grad()
def nearest(
    query: Tensor, keys: Tensor, k: int, *, frequency: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`top_k` (with a frequency, `diversified_top_k`) of the cosines with many keys; never holds [B, M].

    Both orders are total, so the best of all are the best among the best of each chunk.

    Args:
        query: [B, D].
        keys: [M, D].
        k: keys per query.
        frequency: as in `diversified_top_k` [M].
        chunk: keys that are looked at together.

    Returns:
        ids [B, k] and their cosines [B, k], without gradient.
    """
    query = normalized(query)
    ids = torch.empty(len(query), 0, dtype=torch.int64, device=query.device)
    scores = query.new_empty(len(query), 0)

    def best(scores: Tensor, weight: Tensor | None) -> Tensor:
        most = min(k, scores.shape[1])
        return top_k(scores, most) if weight is None else diversified_top_k(scores, weight, most)

    for start in range(0, len(keys), chunk):
        part = query @ normalized(keys[start : start + chunk]).T
        of_part = best(part, None if frequency is None else frequency[start : start + chunk])
        ids, scores = torch.cat([ids, of_part + start], 1), torch.cat([scores, part.gather(1, of_part)], 1)
        place = best(scores, None if frequency is None else frequency[ids])
        ids, scores = ids.gather(1, place), scores.gather(1, place)
    return ids, scores


def diversified_top_k(scores: Tensor, frequency: Tensor, k: int) -> Tensor:
    """L2P eq. 4: the k prompts with the smallest distance times frequency.

    Args:
        scores: cosines [B, M]; the distance is 1 - cosine.
        frequency: how often each prompt was chosen in earlier tasks, [M] or [B, M].
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
    """How often each number below `size` occurs in `ids` [B, ..., k]: int64 [..., size], over images and choices.

    Images where `counted` [B] is False are left out; None: all are counted.
    """
    ones = torch.ones_like(ids)
    if counted is not None:
        ones = ones * counted.view(-1, *[1] * (ids.dim() - 1))
    ids, ones = (x.movedim(0, -2).flatten(-2) for x in (ids, ones))
    counts = torch.zeros(*ids.shape[:-1], size, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(-1, ids, ones)


def route(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best of `scores` [B, M] and their softmax among themselves: ids [B, k], weights [B, k]."""
    best, ids = scores.topk(k, dim=1)
    return ids, best.softmax(dim=1)
