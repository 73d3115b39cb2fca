"""Which prompts L2P selects, the loss of their keys, and the passes of an ensemble.

Letters in shapes: B images, S pools, R ranks (passes per pool), K prompts of a pass, M prompts of all pools, W key width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import LossPart, PoolInput
from cl_prompts.methods.l2p.majority_vote import majority_vote
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.selection import diversified_top_k, nearest, top_k


def choose(
    config: Any, batch: PoolInput, query: Tensor, keys: Tensor, scores: Tensor | None, history: ActivationHistory
) -> Tensor:
    """The selected prompts of each pool, best first: [B, S, R, K], numbered over all pools. R is 1 in training.

    Args:
        config: an `L2PConfig`.
        batch: input of the pool.
        query: as it is compared with keys [B, W].
        keys: of all pools, without gradient [M, W].
        scores: cosines [B, M]; None: `keys` are searched in chunks.
        history: how often each prompt was selected, for the diversified selection.
    """
    frequency = None
    if config.diversified_selection and batch.task:  # the first task has no history
        count = history.before(batch.task)
        frequency = (count / count.sum().clamp_min(1)).to(query.dtype)
    ranks = config.ensemble if batch.task is None else 1
    size, k = keys.shape[0] // config.num_pools, ranks * config.top_k
    found = []
    for start in range(0, keys.shape[0], size):
        own = slice(start, start + size)
        often = None if frequency is None else frequency[own]
        if scores is None:
            ids = nearest(query, keys[own], k, frequency=often)[0]
        elif often is None:
            ids = top_k(scores.detach()[:, own].contiguous(), k)
        else:
            ids = diversified_top_k(scores.detach()[:, own], often, k)
        if config.batchwise_selection:
            ids = majority_vote(ids, size, batch.valid, over_processes=batch.task is not None)
        found.append(ids + start)
    return torch.stack(found, 1).unflatten(2, (ranks, config.top_k))


def pull(config: Any, query: Tensor, keys: Tensor, ids: Tensor, cosines: Tensor) -> LossPart:
    """The key loss of the selected keys `ids` [B, n], with their `cosines` [B, n], summed over them; mean over images."""
    if config.key_loss == "similarity":
        return LossPart(-config.pull_coefficient * cosines.sum(1), "mean")
    apart = query[:, None] - F.embedding(ids, keys)
    return LossPart(config.pull_coefficient * apart.square().sum((1, 2)), "mean")


def passes(config: Any, ids: Tensor) -> int:
    """Number of passes of an image for the selection `ids` [B, S, R, K]: R for each pool, or R of pools' averages."""
    return ids.shape[2] * (1 if config.pool_average == "prompts" else ids.shape[1])


def tokens_of(config: Any, ids: Tensor, prompts: Tensor) -> Tensor:
    """Tokens of each pass [B * passes, K * Lp, D], for the selection `ids` [B, S, R, K] of the `prompts` [M, Lp, D].

    With `pool_average` "answers" every pool has R passes. With "prompts" the j-th selected prompts of all pools are
    averaged, so there are R.
    """
    rows = F.embedding(ids, prompts.flatten(1))
    if config.pool_average == "prompts":
        rows = rows.mean(1)
    return rows.reshape(-1, ids.shape[3] * prompts.shape[1], prompts.shape[2])


def by_pass(config: Any, values: Tensor) -> Tensor:
    """Values of the selected prompts [B, S, R, K] in the order of the passes of `tokens_of`: [B * passes, n]."""
    if config.pool_average == "prompts":
        values = values.transpose(1, 2).flatten(2)[:, None]
    return values.flatten(0, 2)
