"""Statistics of a prompt pool: which prompts are selected for which task, how evenly, and how similar prompts are.

Letters in shapes: T tasks, M prompts of a pool; `...` stands for layers (and heads), if each of them selects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def selection_counts(ids: Tensor, tasks: Tensor, pool_size: int) -> Tensor:
    """Number of images of each task for which each prompt was selected.

    Args:
        ids: `prompt_ids` of the outputs, [images, ..., k].
        tasks: number of each image's task, from 0 [images].
        pool_size: M.

    Returns:
        int64 [T, ..., M].
    """
    by_task = [ids[tasks == task].movedim(0, -2).flatten(-2) for task in range(int(tasks.max()) + 1)]
    zeros = torch.zeros(*ids.shape[1:-1], pool_size, dtype=torch.int64, device=ids.device)
    return torch.stack([zeros.scatter_add(-1, own, torch.ones_like(own)) for own in by_task])


def routing_entropy(counts: Tensor) -> Tensor:
    """Entropy of the selection frequencies, divided by log M: 1 if they are equal, 0 if one prompt is always selected.

    Args:
        counts: [..., M]; all zeros count as 0.

    Returns:
        float64 [...].
    """
    share = counts.double() / counts.sum(-1, keepdim=True).clamp_min(1)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return entropy / math.log(max(counts.shape[-1], 2))


def selected_sets(ids: Tensor) -> Tensor:
    """Number of different sets of prompts that images use, in any order.

    Args:
        ids: `prompt_ids` of the outputs, [images, ..., k].

    Returns:
        int64 [...].
    """
    groups = ids.sort(-1).values.movedim(0, -2).flatten(0, -3) if ids.dim() > 2 else ids.sort(-1).values[None]
    return torch.tensor([len(group.unique(dim=0)) for group in groups]).view(ids.shape[1:-1])


def weight_entropy(weights: Tensor) -> Tensor:
    """Entropy of each image's mixing weights, divided by log k: 1 if its prompts have equal weights, 0 if one has all.

    Args:
        weights: `prompt_weights` of outputs whose weights are shares, as Hash's and CPG's, [images, ..., k].

    Returns:
        float32 [images, ...].
    """
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return entropy / math.log(max(weights.shape[-1], 2))


def are_shares(weights: Tensor) -> bool:
    """Whether each image's weights are shares: not negative, with the sum 1. Cosines and other scores are not.

    Args:
        weights: `prompt_weights` of outputs [images, ..., k].
    """
    return bool((weights >= 0).all() and ((weights.float().sum(-1) - 1).abs() < 1e-3).all())


@torch.no_grad()
def prompt_similarity(table: Tensor) -> Tensor:
    """Cosine similarity of all pairs of prompts in each group (layer, or head of a layer).

    Args:
        table: the prompts, `model.adapter.pool.prompt_table()` [groups, M, ...].

    Returns:
        [groups, M, M].
    """
    unit = F.normalize(table.flatten(2), dim=-1, eps=1e-6)
    return unit @ unit.mT


def selection_summary(
    counts: Tensor, similarity: Tensor | None = None, sets: Tensor | None = None, mixing: Tensor | None = None
) -> str:
    """Summary of the selection in a few lines of Markdown.

    Args:
        counts: from `selection_counts` [T, ..., M].
        similarity: from `prompt_similarity` [groups, M, M]; None: left out.
        sets: from `selected_sets` [...]; None: left out.
        mixing: from `weight_entropy` [images, ...]; None: left out.
    """
    by_task = routing_entropy(counts).view(len(counts), -1).mean(1).tolist()
    total = counts.sum(0)
    unused = int((total == 0).sum())
    lines = [
        f"- routing entropy by task: {' '.join(f'{e:.2f}' for e in by_task)} (1: prompts are chosen alike, 0: always the "
        "same one; mean over layers)",
        f"- routing entropy over all tasks: {routing_entropy(total).mean():.2f}",
        f"- prompts chosen for no image: {unused} of {total.numel()}",
    ]
    if sets is not None:
        numbers = " ".join(map(str, sets.flatten().tolist()))
        lines.append(f"- different sets of prompts that images use, by layer: {numbers}")
    if mixing is not None:
        numbers = " ".join(f"{e:.2f}" for e in mixing.mean(0).flatten())
        lines.append(f"- entropy of an image's weights, by layer: {numbers} (1: its prompts weigh alike, 0: one has all)")
    if similarity is not None and similarity.shape[-1] > 1:
        other = similarity[:, ~torch.eye(similarity.shape[-1], dtype=torch.bool, device=similarity.device)]
        lines.append(f"- cosine of two prompts: mean {other.mean():.2f}, largest {other.max():.2f}")
    return "\n".join(lines)
