"""Selection of prompts by scores. Letters in shapes: B images, M prompts in the pool, D width, k selected prompts."""

from __future__ import annotations

import torch
from torch import Tensor


# Larger pools are searched in chunks of this many prompts, so that memory does not grow with the pool.
CHUNK = 4096
FEW = 64  # scores that are sorted faster than their order is made unambiguous


def normalized(vectors: Tensor) -> Tensor:
    """Vectors [..., D] divided by their 2-norm. The squared norm is at least 1e-12, as in the released L2P code."""
    return vectors * vectors.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def cosine_scores(query: Tensor, keys: Tensor) -> Tensor:
    """Cosine of every `query` [B, D] with every one of `keys` [M, D]: [B, M]."""
    return normalized(query) @ normalized(keys).T


def cosine_of(query: Tensor, chosen: Tensor) -> Tensor:
    """Cosine of each `query` [B, D] with its own keys, `chosen` [B, k, D]: [B, k]."""
    return (normalized(query)[:, None] * normalized(chosen)).sum(2)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [B, k] of the `k` largest float32 `scores` [B, M], best first; of equal scores the lower index is first."""
    if scores.shape[1] <= FEW:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    # torch.topk does not define the order of equal values. Each score is therefore mapped to a distinct integer: the bits
    # of the float in the order of their values, then M - 1 - index. Adding 0 turns -0 into 0.
    bits = (scores + 0.0).view(torch.int32)
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    number = torch.arange(scores.shape[1] - 1, -1, -1, device=scores.device)
    return (order * 2**32 + number).topk(k, dim=1).indices


def diversified_top_k(scores: Tensor, frequency: Tensor, k: int) -> Tensor:
    """L2P eq. 4: the `k` prompts with the smallest product of distance and frequency.

    Args:
        scores: cosines [B, M]; the distance is 1 - cosine.
        frequency: how often each prompt was selected in earlier tasks, [M] or [B, M].
        k: prompts per image.

    Returns:
        ids [B, k]. Of equal products (0 for prompts that were never selected) the one with the smaller distance is first.
    """
    distance = 1 - scores
    nearest_first = distance.argsort(dim=1, stable=True)
    product = (distance * frequency).gather(1, nearest_first)
    return nearest_first.gather(1, product.argsort(dim=1, stable=True)[:, :k])


@torch.no_grad()
def nearest(
    query: Tensor, keys: Tensor, k: int, *, frequency: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """`top_k`, or with a frequency `diversified_top_k`, of the cosines with many keys, without a tensor [B, M].

    Both orders are total, so the best of all keys are the best of the best of each chunk.

    Args:
        query: [B, D].
        keys: [M, D].
        k: keys per query.
        frequency: as in `diversified_top_k` [M].
        chunk: keys that are compared at once.

    Returns:
        ids [B, k] and their cosines [B, k], without gradient.
    """
    query = normalized(query)
    ids = torch.empty(query.shape[0], 0, dtype=torch.int64, device=query.device)
    scores = query.new_empty(query.shape[0], 0)

    def best(scores: Tensor, weight: Tensor | None) -> Tensor:
        most = min(k, scores.shape[1])
        return top_k(scores, most) if weight is None else diversified_top_k(scores, weight, most)

    for start in range(0, keys.shape[0], chunk):
        part = query @ normalized(keys[start : start + chunk]).T
        of_part = best(part, None if frequency is None else frequency[start : start + chunk])
        ids, scores = torch.cat([ids, of_part + start], 1), torch.cat([scores, part.gather(1, of_part)], 1)
        place = best(scores, None if frequency is None else frequency[ids])
        ids, scores = ids.gather(1, place), scores.gather(1, place)
    return ids, scores


def histogram(ids: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """How often each number below `size` occurs in `ids` [B, ..., k] of the `valid` images [B]: int64 [..., size]."""
    ones = torch.ones_like(ids)
    if valid is not None:
        ones = ones * valid.view(-1, *[1] * (ids.dim() - 1))
    ids, ones = (x.movedim(0, -2).flatten(-2) for x in (ids, ones))
    counts = torch.zeros(*ids.shape[:-1], size, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(-1, ids, ones)
