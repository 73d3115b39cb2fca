"""Selection, masked logits, loss and combination of candidates, computed from the prompted pass."""

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
    """Prompts that a pass used. A field is None if the method does not have it.

    Args:
        ids: numbers of the prompts [B, k], or [B, layers, k] if each layer selects.
        weights: their weights, of the same shape.
        scores: scores of all prompts of the pool, by which they were selected: [B, M] or [B, layers, M].
    """

    ids: Tensor | None
    weights: Tensor | None
    scores: Tensor | None


def selection_of(prompts: Prompts, used: Mapping[int, PrefixKV]) -> Selection:
    """The pool's selection or, if it made none, those of the layers, stacked over layers."""
    layers = [used[layer] for layer in sorted(used)]

    def stacked(own: Tensor | None, by_layer: list[Tensor | None]) -> Tensor | None:
        values = [value for value in by_layer if value is not None]
        return torch.stack(values, 1) if own is None and values else own

    return Selection(
        stacked(prompts.ids, [prefix.ids for prefix in layers]),
        stacked(prompts.weights, [prefix.weights for prefix in layers]),
        stacked(prompts.scores, [prefix.scores for prefix in layers]),
    )


def mask_logits(adapter: PoolAdapter, logits: Tensor, targets: Tensor | None) -> Tensor:
    """Training logits [B, C] with -inf at the classes that `class_mask` of the config excludes from the loss."""
    mask = adapter.config.class_mask
    if mask == "task":
        return logits.masked_fill(~adapter.head.current, float("-inf"))
    if targets is None:
        return logits
    if mask == "batch":
        return logits.masked_fill(~classes_present(targets, logits.shape[1]), float("-inf"))
    if len(adapter.tasks.current_classes) == 1:  # images of one class would turn the prompts of all images towards it
        present = classes_present(targets, logits.shape[1])
        return logits.masked_fill(~present & (present.sum() == 1), float("-inf"))
    return logits


def head_losses(adapter: PoolAdapter, features: Tensor, targets: Tensor) -> dict[str, LossPart]:
    """The head's loss on the features of all classes seen, for a step whose images show it one class only.

    That is a step of a task of one class, of the task after a first one of one class, and, for a `class_mask` that depends
    on the batch, with a batch of one class. The prompts get no gradient from it: images of one class do not show what it
    differs from, and any change of the features of all images towards that class would lower the loss.

    Args:
        adapter: its running Gaussians are updated.
        features: input of the head [B, D].
        targets: index of the logit of each image's class [B]; -100 for padding.
    """
    gaussians, mask = adapter.running_gaussians, adapter.config.class_mask
    if gaussians is None:
        return {}
    gaussians.update(adapter.head, features, targets)
    alone, after_one = (len(classes) == 1 for classes in (adapter.tasks.current_classes, adapter.tasks.earlier_classes))
    read = alone or after_one or mask == "batch"
    if read or adapter.config.num_labels is not None:  # without tasks there is no end of a task to gather them at
        gaussians.gather()
    if not read:
        return {}
    loss = gaussians.cross_entropy(adapter.head)
    if mask != "task" and not after_one:  # with images of several classes, as in rehearsal, the images teach the head
        loss = torch.where(classes_present(targets, len(adapter.classes)).sum() == 1, loss, 0.0)
    return {"class_gaussians": LossPart(loss, "batch")}


def classes_present(targets: Tensor, num_classes: int) -> Tensor:
    """Which classes the images of the global batch are of [C]. `targets` are class indices [B], -100 for padding."""
    present = torch.zeros(num_classes + 1, dtype=torch.int64, device=targets.device)
    present[torch.where(targets >= 0, targets, num_classes)] = 1
    return sum_over_processes(present)[:-1] > 0


def method_losses(
    pool: PromptPool,
    prompts: Prompts,
    used: Mapping[int, PrefixKV],
    features: Tensor,
    targets: Tensor,
    valid: Tensor,
    chosen: Selection,
) -> dict[str, LossPart]:
    """The method's terms of the training loss, by name. Terms of the same name are added, for example over layers."""
    parts: dict[str, LossPart] = {}
    for source in (
        prompts.losses,
        *(prefix.losses for prefix in used.values()),
        pool.regularizers(chosen.scores, valid),
        pool.feature_losses(features, targets, valid),
    ):
        for name, part in source.items():
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
    """Cross entropy plus the method's parts: the total, a scalar, and the terms that it is the sum of, by name."""
    each = F.cross_entropy(logits, targets, reduction="none")
    return add_up({"cross_entropy": LossPart(each, "mean"), **parts}, valid, num_items, over_processes=over_processes)


def combine_candidates(
    adapter: PoolAdapter, prompts: Prompts, logits: Tensor, features: Tensor, chosen: Selection
) -> tuple[Tensor, Tensor, Selection]:
    """Combine the c candidates of each image into one row.

    Args:
        adapter: its trained head gives the confidence of a candidate, the largest class probability.
        prompts: `prompts.combine` is "confident" (the most confident candidate of each image) or "mean" (the log of the
            mean probabilities, features and scores of the first candidate, ids and weights of all).
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
        # Always by the trained head, as when features are collected for a classifier that is computed from them.
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
