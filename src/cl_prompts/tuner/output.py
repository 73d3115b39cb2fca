"""From features and logits of the prompted pass to one answer per image and the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import LossPart, PrefixKV, Prompts
from cl_prompts.learner.losses import add_up
from cl_prompts.methods import PromptPool
from cl_prompts.runtime.distributed import sum_over_processes
from cl_prompts.tuner.adapter import PoolAdapter


@dataclass(frozen=True)
class Selection:
    """Prompts that a pass used: numbers, weights, and the scores they were chosen by; None where a method has none.

    Args:
        ids: [B, k], or [B, layers, k] where each layer chooses.
        weights: likewise.
        scores: [B, M] or [B, layers, M].
    """

    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None


def selection_of(prompts: Prompts, used: Mapping[int, PrefixKV]) -> Selection:
    """What the pool chose or, where it chose nothing, what the layers chose inside their attention, stacked over layers."""
    layers = [used[layer] for layer in sorted(used)]

    def stacked(own: Tensor | None, by_layer: list[Tensor | None]) -> Tensor | None:
        found = [value for value in by_layer if value is not None]
        return torch.stack(found, 1) if own is None and found else own

    return Selection(
        stacked(prompts.ids, [prefix.ids for prefix in layers]),
        stacked(prompts.weights, [prefix.weights for prefix in layers]),
        stacked(prompts.scores, [prefix.scores for prefix in layers]),
    )


def mask_logits(adapter: PoolAdapter, logits: Tensor, targets: Tensor | None, valid: Tensor) -> Tensor:
    """Training logits [B, C] with -inf at the classes that the loss does not see (`class_mask` of the config)."""
    mask = adapter.config.class_mask
    if mask == "task":
        return logits.masked_fill(~adapter.head.current, float("-inf"))
    if mask == "batch" and targets is not None:
        present = torch.zeros(logits.shape[1] + 1, dtype=torch.int64, device=logits.device)
        present[torch.where(valid, targets, logits.shape[1])] = 1
        return logits.masked_fill(sum_over_processes(present)[:-1] == 0, float("-inf"))
    return logits


def method_losses(
    pool: PromptPool,
    prompts: Prompts,
    used: Mapping[int, PrefixKV],
    features: Tensor,
    targets: Tensor,
    valid: Tensor,
    chosen: Selection,
) -> dict[str, LossPart]:
    """The method's terms of the training loss; those of one name are added up over the layers."""
    parts: dict[str, LossPart] = {}
    for found in (
        prompts.losses,
        *(prefix.losses for prefix in used.values()),
        pool.regularizers(chosen.scores, valid),
        pool.feature_losses(features, targets, valid),
    ):
        for name, part in found.items():
            known = parts.get(name)
            parts[name] = part if known is None else LossPart(known.value + part.value, part.reduction)
    return parts


def total_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor,
    parts: Mapping[str, LossPart],
    num_items: Tensor | int | None,
    *,
    over_processes: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy plus the method's parts: the total and each part as it enters the total."""
    each = F.cross_entropy(logits, targets, reduction="none")
    return add_up({"cross_entropy": LossPart(each, "mean"), **parts}, valid, num_items, over_processes=over_processes)


def combine_candidates(
    adapter: PoolAdapter, prompts: Prompts, logits: Tensor, features: Tensor, chosen: Selection
) -> tuple[Tensor, Tensor, Selection]:
    """One answer per image from its c candidates.

    Args:
        adapter: its trained head tells how confident a candidate is.
        prompts: says how candidates are combined: "confident" takes the most confident candidate of each image; "mean"
            takes the log of the mean probability, features and scores of the first candidate, and the prompts of all.
        logits: [B * c, C].
        features: [B * c, D].
        chosen: rows for all candidates.

    Returns:
        Logits [B, C], features [B, D] and the selection [B, ...].
    """
    candidates = prompts.candidates

    def joined(x: Tensor | None) -> Tensor | None:
        """[B * c, ..., k] -> [B, ..., c * k]."""
        return None if x is None else x.unflatten(0, (-1, candidates)).movedim(1, -2).flatten(-2)

    if prompts.combine == "confident":
        # By the trained head, so that the features are those that a classifier made from them has seen.
        best = most_confident(adapter.head(features), candidates)
        combined, features = logits[best], features[best]
        ids, weights = (None if x is None else x[best] for x in (chosen.ids, chosen.weights))
    else:
        best = torch.arange(0, logits.shape[0], candidates, device=logits.device)
        combined = logits.log_softmax(1).unflatten(0, (-1, candidates)).logsumexp(1) - math.log(candidates)
        features, ids, weights = features[best], joined(chosen.ids), joined(chosen.weights)
    scores = chosen.scores
    if scores is not None and prompts.scores is None:  # chosen in the passes, not once per image before them
        scores = scores[best]
    return combined, features, Selection(ids, weights, scores)


def most_confident(logits: Tensor, candidates: int) -> Tensor:
    """Row of the most confident candidate of each image [B], for logits [B * candidates, C]."""
    confidence = logits.softmax(1).amax(1).unflatten(0, (-1, candidates))
    first = torch.arange(0, logits.shape[0], candidates, device=logits.device)
    return first + confidence.argmax(1)
