"""Evaluation: the model gets images, and tasks only if it needs them; predictions are compared with labels and tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_prompts.evaluation.calibration import BINS, Reliability
from cl_prompts.evaluation.novelty import NoveltyMeasures
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.learner.batches import as_batch
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import gather_over_processes, sum_over_processes, world_size


LEAST = math.log(1e-30)  # of a log probability, also for a class that the model does not know


@dataclass(frozen=True)
class Evaluation:
    """Measures on a set of images, over all processes, in percent of the images.

    Args:
        accuracy: accuracy over all known classes.
        images: number of images.
        prompt_ids: selected prompts of each image [images, ..., k], on the CPU, in the order of processes; None if the
            method selects none.
        task_incremental: accuracy over the classes of the images' task only; None without a task.
        task_of_class: share of images whose predicted class belongs to their task; None without a task.
        task_identity: share of images for which the prompts of their task were selected, averaged over layers if each layer
            selects; None without a task, or if the method does not select prompts by task.
        by_classifier: accuracy of extra classifiers on the same features, by name.
        reliability: confidence and accuracy of the answers; None if it is unknown.
        novelty: novelty of each image [images], on the CPU, in the order of `prompt_ids`; None if it was not asked for.
        prompt_weights: scores or mixing weights of `prompt_ids` [images, ..., k]; None if the method gives none.
    """

    accuracy: float
    images: int
    prompt_ids: Tensor | None
    task_incremental: float | None = None
    task_of_class: float | None = None
    task_identity: float | None = None
    by_classifier: dict[str, float] = field(default_factory=dict)
    reliability: Reliability | None = None
    novelty: Tensor | None = None
    prompt_weights: Tensor | None = None


@torch.no_grad()
def evaluate(
    model: Learner,
    batches: Iterable[Any],
    classes: Sequence[int],
    device: torch.device | str,
    *,
    task: int | None = None,
    tasks: Sequence[Sequence[int]] | None = None,
    earlier_tasks: int = 0,
    classifiers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    novelty: bool = False,
) -> Evaluation:
    """Evaluate a model on images.

    Args:
        model: the model, in eval mode. It gets `pixel_values`, and `query` and `lower_blocks` if a batch has them, but no
            labels, and `task` only if it `needs_task`: its accuracy is then with the task told.
        batches: this process's share of the batches, with `pixel_values` and `labels`, or pairs (images, labels).
        classes: class id of each column of the logits.
        device: the model's device.
        task: number of the images' task, for the measures that need it; None: these are None.
        tasks: class ids of each task of the stream; needed with `task`.
        earlier_tasks: number of tasks that the model learned before those of the stream.
        classifiers: extra classifiers by name: functions features [B, D], float32 -> logits [B, C], same columns.
        novelty: also collect the novelty of each image.

    Raises:
        TypeError: a batch is of another form.
        ValueError: there are no images; `task` is not in `tasks`, or the model knows none of its classes; logits do not
            match `classes` in shape, or are NaN.
    """
    ids = torch.tensor(list(classes), device=device)
    own = None if task is None else _members(ids, task, tasks)
    told = {}
    if task is not None and model.needs_task and earlier_tasks + task < model.num_tasks:  # one to come has no part yet
        told["task"] = earlier_tasks + task
    counted = ["images", "hits", "no numbers", "task_incremental", "task_of_class", "choices", "task_identity"]
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in counted}
    classifiers = dict(classifiers or {})
    further = {name: torch.zeros((), dtype=torch.int64, device=device) for name in classifiers}
    bins = torch.zeros(3 * BINS + 1, dtype=torch.float64)  # images, hits, confidences; the loss
    chosen, weights, scores = [], [], []
    model.gather_statistics()
    for given in batches:
        batch = as_batch(given)
        values = {name: batch[name].to(device) for name in ("pixel_values", "query", "lower_blocks") if name in batch}
        labels = batch["labels"].to(device)
        output = model(**values, **told)
        real = labels.ne(IGNORE_INDEX)
        logits = _checked(output.logits, ids, "the model")
        predicted = logits.argmax(1)
        counts["images"] += real.sum()
        counts["hits"] += ((ids[predicted] == labels) & real).sum()
        counts["no numbers"] += (logits.isnan().any(1) & real).sum()
        bins += _confidences(logits[real], ids[None] == labels[real, None], BINS)
        if own is not None and task is not None:
            known = logits.masked_fill(~own, float("-inf")).argmax(1)
            counts["task_incremental"] += ((ids[known] == labels) & real).sum()
            counts["task_of_class"] += (own[predicted] & real).sum()
            by_prompts = model.chosen_tasks(output)
            if by_prompts is not None:
                counts["choices"] += by_prompts[real].numel()
                counts["task_identity"] += (by_prompts[real] == earlier_tasks + task).sum()
        for name, classifier in classifiers.items():
            own_logits = _checked(_classified(classifier, output.features, name), ids, f"classifier {name!r}")
            further[name] += ((ids[own_logits.argmax(1)] == labels) & real).sum()
            counts["no numbers"] += (own_logits.isnan().any(1) & real).sum()
        if output.prompt_ids is not None:
            chosen.append(output.prompt_ids[real])
            if output.prompt_weights is not None:
                weights.append(output.prompt_weights[real])
        if novelty:
            scores.append(model.novelty(output)[real])
    total = sum_over_processes(torch.stack([*counts.values(), *further.values()])).tolist()
    totals = dict(zip(counts, total, strict=False))
    images = totals["images"]
    if not images:
        raise ValueError("there are no images to evaluate on")
    if totals["no numbers"]:
        raise ValueError(
            f"{totals['no numbers']} answers on {images} images are NaN: the training diverged, lower the learning rate"
        )
    *sums, loss = sum_over_processes(bins.to(device) if world_size() > 1 else bins).tolist()
    per_bin = [sums[start : start + BINS] for start in range(0, 3 * BINS, BINS)]
    prompt_ids, prompt_weights, novelties = (
        torch.cat(gather_over_processes(torch.cat(parts))).cpu() if parts else None for parts in (chosen, weights, scores)
    )
    return Evaluation(
        accuracy=100 * totals["hits"] / images,
        images=images,
        prompt_ids=prompt_ids,
        task_incremental=None if own is None else 100 * totals["task_incremental"] / images,
        task_of_class=None if own is None else 100 * totals["task_of_class"] / images,
        task_identity=100 * totals["task_identity"] / totals["choices"] if totals["choices"] else None,
        by_classifier={name: 100 * hits / images for name, hits in zip(further, total[len(counts) :], strict=True)},
        reliability=Reliability([round(n) for n in per_bin[0]], [round(n) for n in per_bin[1]], per_bin[2], loss),
        novelty=novelties,
        prompt_weights=prompt_weights,
    )


def _confidences(logits: Tensor, right: Tensor, bins: int) -> Tensor:
    """Numbers of images and hits and sum of confidences in each bin, and the sum of losses: [3 * bins + 1] on the CPU.

    Args:
        logits: [n, C].
        right: whether a column is the image's class [n, C]; no column if the class is unknown.
        bins: of the confidence.
    """
    logs = logits.cpu().double().log_softmax(1)  # Apple's devices have no float64
    confidence, predicted = logs.exp().max(1)
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    right = right.cpu()
    hits = right.gather(1, predicted[:, None])[:, 0].double()
    loss = -logs.masked_fill(~right, -math.inf).amax(1).clamp_min(LEAST)
    parts = [
        number.new_zeros(bins).double().index_add_(0, number, part) for part in (torch.ones_like(hits), hits, confidence)
    ]
    return torch.cat([*parts, loss.sum()[None]])


def reliability_of(evaluations: Sequence[Evaluation]) -> Reliability | None:
    """The reliability on the images of all `evaluations`; None if it is unknown for some."""
    parts = [evaluation.reliability for evaluation in evaluations]
    known = [part for part in parts if part is not None]
    return Reliability.total(known) if known and len(known) == len(parts) else None


def novelty_of(
    seen: Sequence[Evaluation], to_come: Sequence[Evaluation], threshold: float | None
) -> NoveltyMeasures | None:
    """How well the novelty tells images of seen tasks from those of tasks `to_come`; None without the one or the other.

    Args:
        seen: evaluations on seen tasks, with `novelty`.
        to_come: the same on tasks all of whose classes are unknown.
        threshold: of the learner, or None.
    """
    known, unknown = ([e.novelty for e in part if e.novelty is not None] for part in (seen, to_come))
    return NoveltyMeasures.of(torch.cat(known), torch.cat(unknown), threshold) if known and unknown else None


def _members(ids: Tensor, task: int, tasks: Sequence[Sequence[int]] | None) -> Tensor:
    """Whether each column of the logits is a class of the task: bool [C]."""
    if tasks is None or not 0 <= task < len(tasks):
        raise ValueError(f"task={task} needs `tasks`, the classes of each task; got {tasks and len(tasks)} of them")
    own = torch.isin(ids, torch.tensor(list(tasks[task]), device=ids.device))
    if not own.any():
        raise ValueError(f"the model knows none of the classes {list(tasks[task])} of task {task}: begin the task first")
    return own


def _checked(logits: Tensor, ids: Tensor, whose: str) -> Tensor:
    if logits.shape[1:] != ids.shape:
        raise ValueError(f"the logits of {whose} are of shape {list(logits.shape)}, expected [images, {len(ids)} classes]")
    return logits


def _classified(classifier: Callable[[Tensor], Tensor], features: Tensor | None, name: str) -> Tensor:
    """Logits of an extra classifier on the features of a pass, computed in float32 like the model's own."""
    if features is None:
        raise ValueError(f"the model's output holds no `features` for classifier {name!r}")
    with torch.autocast(features.device.type, enabled=False):
        return classifier(features.float())


def accuracy(
    model: Learner, batches: Iterable[dict[str, Any]], classes: Sequence[int], device: torch.device | str
) -> tuple[float, int]:
    """Accuracy in percent over all processes, and the number of images.

    `model`, `batches`, `classes` and `device` are as in `evaluate`.
    """
    evaluation = evaluate(model, batches, classes, device)
    return evaluation.accuracy, evaluation.images


@torch.no_grad()
def stream_features(
    model: Learner,
    batches: Iterable[dict[str, Any]],
    rows: int,
    device: torch.device | str,
    keep: Callable[[Sequence[int], Tensor | None], None] | None = None,
) -> Tensor:
    """Un-prompted features of images of a stream by row number: [rows, D] on the CPU; rows without an image are zeros.

    Args:
        model: the model, not wrapped.
        batches: this process's share of the batches (`ClassIncrementalStream.all_images`).
        rows: number of rows of the data set.
        device: the model's device.
        keep: called with row numbers and hidden states (`Learner.extract_lower_blocks`) of each batch; None: not called.
    """
    parts, numbers = [], []
    for batch in batches:
        images = batch["pixel_values"].to(device)
        if keep is None:
            features = model.extract_features(images)
        else:
            features, hidden = model.extract_lower_blocks(images)
            keep(batch["sample_ids"], hidden)
        features = features.cpu()
        sample_ids = torch.tensor(batch["sample_ids"])
        parts.append(features[sample_ids >= 0])
        numbers.append(sample_ids[sample_ids >= 0])
    features, positions = torch.cat(parts).to(device), torch.cat(numbers).to(device)
    table = torch.zeros(rows, features.shape[1])
    for part, indices in zip(gather_over_processes(features), gather_over_processes(positions), strict=True):
        table[indices.cpu()] = part.cpu()
    return table
