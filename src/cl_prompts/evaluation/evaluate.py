"""Evaluation: the model gets images only; labels and tasks are compared with its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import gather_over_processes, sum_over_processes


@dataclass(frozen=True)
class Evaluation:
    """Measures on a set of images, over all processes. Shares are in percent of the images.

    Args:
        accuracy: among all known classes.
        images: number of images.
        prompt_ids: chosen prompts of each image [images, ..., k], on the CPU, process by process; None if none are chosen.
        task_incremental: accuracy among the classes of the images' task; None without a task.
        task_of_class: share whose predicted class belongs to the images' task; None without a task.
        task_identity: share for which the prompts of the images' task were chosen, averaged over layers that choose
            separately; None without a task, or if the method does not choose prompts by task.
        by_classifier: accuracy of extra classifiers on the same features, by name.
    """

    accuracy: float
    images: int
    prompt_ids: Tensor | None
    task_incremental: float | None = None
    task_of_class: float | None = None
    task_identity: float | None = None
    by_classifier: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    model: Learner,
    batches: Iterable[dict[str, Any]],
    classes: Sequence[int],
    device: torch.device | str,
    *,
    task: int | None = None,
    tasks: Sequence[Sequence[int]] | None = None,
    classifiers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Evaluation:
    """Measure a model's answers on images.

    Args:
        model: in eval mode. It gets `pixel_values` and, where the batches have it, `query`: neither labels nor tasks.
        batches: this process's share, with `pixel_values` and `labels`.
        classes: class id of each column of the logits.
        device: where the model is.
        task: number of the task that the images belong to; None: not known. It is compared with the answers.
        tasks: class ids of each task of the stream; needed with `task`.
        classifiers: extra classifiers, float32 `features` [B, D] of the same pass -> logits [B, C] of the same columns.

    Raises:
        ValueError: no images, a task that is not in `tasks` or of which the model knows no class, logits whose shape does
            not match `classes` or that are NaN.
    """
    ids = torch.tensor(list(classes), device=device)
    own = None if task is None else _members(ids, task, tasks)
    counted = ["images", "hits", "no numbers", "task_incremental", "task_of_class", "choices", "task_identity"]
    counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in counted}
    classifiers = dict(classifiers or {})
    further = {name: torch.zeros((), dtype=torch.int64, device=device) for name in classifiers}
    chosen = []
    for batch in batches:
        values = {name: batch[name].to(device) for name in ("pixel_values", "query") if name in batch}
        labels = batch["labels"].to(device)
        output = model(**values)
        real = labels.ne(IGNORE_INDEX)
        logits = _checked(output.logits, ids, "the model")
        predicted = logits.argmax(1)
        counts["images"] += real.sum()
        counts["hits"] += ((ids[predicted] == labels) & real).sum()
        counts["no numbers"] += (logits.isnan().any(1) & real).sum()
        if own is not None and task is not None:
            known = logits.masked_fill(~own, float("-inf")).argmax(1)
            counts["task_incremental"] += ((ids[known] == labels) & real).sum()
            counts["task_of_class"] += (own[predicted] & real).sum()
            by_prompts = model.chosen_tasks(output)
            if by_prompts is not None:
                counts["choices"] += by_prompts[real].numel()
                counts["task_identity"] += (by_prompts[real] == task).sum()
        for name, classifier in classifiers.items():
            answer = _checked(_classified(classifier, output.features, name), ids, f"classifier {name!r}")
            further[name] += ((ids[answer.argmax(1)] == labels) & real).sum()
            counts["no numbers"] += (answer.isnan().any(1) & real).sum()
        if output.prompt_ids is not None:
            chosen.append(output.prompt_ids[real])
    total = sum_over_processes(torch.stack([*counts.values(), *further.values()])).tolist()
    found = dict(zip(counts, total, strict=False))
    images = found["images"]
    if not images:
        raise ValueError("there are no images to evaluate on")
    if found["no numbers"]:
        raise ValueError(
            f"{found['no numbers']} answers on {images} images are NaN: the training diverged, lower the learning rate"
        )
    prompt_ids = torch.cat(gather_over_processes(torch.cat(chosen))).cpu() if chosen else None
    return Evaluation(
        accuracy=100 * found["hits"] / images,
        images=images,
        prompt_ids=prompt_ids,
        task_incremental=None if own is None else 100 * found["task_incremental"] / images,
        task_of_class=None if own is None else 100 * found["task_of_class"] / images,
        task_identity=100 * found["task_identity"] / found["choices"] if found["choices"] else None,
        by_classifier={name: 100 * hits / images for name, hits in zip(further, total[len(counts) :], strict=True)},
    )


def _members(ids: Tensor, task: int, tasks: Sequence[Sequence[int]] | None) -> Tensor:
    """Which columns are classes of the task [C]."""
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
    """Logits on the features of a pass, in float32 as the model's own head."""
    if features is None:
        raise ValueError(f"the model's answer holds no `features` for classifier {name!r} to read")
    with torch.autocast(features.device.type, enabled=False):
        return classifier(features.float())


def accuracy(
    model: Learner, batches: Iterable[dict[str, Any]], classes: Sequence[int], device: torch.device | str
) -> tuple[float, int]:
    """Accuracy in percent over all processes, and the number of images.

    `model`, `batches`, `classes` and `device` are as in `evaluate`.
    """
    found = evaluate(model, batches, classes, device)
    return found.accuracy, found.images


@torch.no_grad()
def stream_features(model: Learner, batches: Iterable[dict[str, Any]], rows: int, device: torch.device | str) -> Tensor:
    """Un-prompted features of images of a stream by row number: [rows, D] on the CPU; rows without an image are zeros.

    Args:
        model: the model, not wrapped.
        batches: this process's share (`ClassIncrementalStream.all_images`).
        rows: number of rows of the data set.
        device: where the model is.
    """
    found, numbers = [], []
    for batch in batches:
        features = model.extract_features(batch["pixel_values"].to(device)).cpu()
        sample_ids = torch.tensor(batch["sample_ids"])
        found.append(features[sample_ids >= 0])
        numbers.append(sample_ids[sample_ids >= 0])
    features, positions = torch.cat(found).to(device), torch.cat(numbers).to(device)
    table = torch.zeros(rows, features.shape[1])
    for part, where in zip(gather_over_processes(features), gather_over_processes(positions), strict=True):
        table[where.cpu()] = part.cpu()
    return table
