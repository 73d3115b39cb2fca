"""From what leaves the prompted pass to one answer per image: classes the loss sees, the loss, several candidates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import LossPart, Prompts
from cl_prompts.learner.losses import add_up
from cl_prompts.runtime.distributed import sum_over_processes
from cl_prompts.tuner.adapter import PoolAdapter


@dataclass
class Chosen:
    """Prompts that a pass used: numbers, weights, and the scores they were chosen by; None where a method has none."""

    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None


@dataclass
class Call:
    """One forward, from the query to the answer."""

    adapter: PoolAdapter
    prompts: Prompts
    batch_size: int
    training: bool
    query: Tensor | None
    targets: Tensor | None
    valid: Tensor
    sample_ids: Any
    num_items: Any
    noise: dict[str, Tensor]
    only_features: bool = False


def masked(call: Call, logits: Tensor) -> Tensor:
    """Training logits with -inf at the classes that the loss does not see (`class_mask`)."""
    mask = call.adapter.config.class_mask
    if mask == "task":
        return logits.masked_fill(~call.adapter.head.current, float("-inf"))
    if mask == "batch" and call.targets is not None:
        present = torch.zeros(logits.shape[1] + 1, dtype=torch.int64, device=logits.device)
        present[torch.where(call.valid, call.targets, logits.shape[1])] = 1
        return logits.masked_fill(sum_over_processes(present)[:-1] == 0, float("-inf"))
    return logits


def loss_of(call: Call, logits: Tensor, more: dict[str, LossPart]) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy plus the method's parts: total and parts."""
    assert call.targets is not None
    each = F.cross_entropy(logits, call.targets, reduction="none")
    parts = {"cross_entropy": LossPart(each, "mean"), **more}
    return add_up(parts, call.valid, call.num_items, over_processes=call.training)


def answer_together(call: Call, logits: Tensor, features: Tensor, chosen: Chosen) -> tuple[Tensor, Tensor, Chosen]:
    """One answer per image from its candidates [images * candidates, ...]: logits, features, and what was chosen.

    "mean" answers with the log of the mean probability, features and scores of the first candidate, and all candidates'
    prompts.
    """
    images, candidates = call.batch_size, call.prompts.candidates

    def joined(x: Tensor | None) -> Tensor | None:
        """[images * candidates, ..., k] -> [images, ..., candidates * k]."""
        return None if x is None else x.unflatten(0, (images, -1)).movedim(1, -2).flatten(-2)

    if call.prompts.combine == "confident":
        # By the trained head, so that features are those that a classifier made from them has seen.
        best = most_confident(call.adapter.head(features), images)
        answer, features = logits[best], features[best]
        ids, weights = (None if x is None else x[best] for x in (chosen.ids, chosen.weights))
    else:
        best = torch.arange(images, device=logits.device) * candidates
        answer = logits.log_softmax(1).unflatten(0, (images, -1)).logsumexp(1) - math.log(candidates)
        features, ids, weights = features[best], joined(chosen.ids), joined(chosen.weights)
    scores = chosen.scores
    if scores is not None and len(scores) > images:  # the pool may have chosen once per image, before the passes
        scores = scores[best]
    return answer, features, Chosen(ids, weights, scores)


def most_confident(logits: Tensor, images: int) -> Tensor:
    """Row of the most confident candidate of each image, for logits [images * candidates, C]."""
    confidence = logits.softmax(1).amax(1).view(images, -1)
    first = torch.arange(images, device=logits.device) * confidence.shape[1]
    return first + confidence.argmax(1)
