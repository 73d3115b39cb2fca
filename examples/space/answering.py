"""Answers of a pool for a picture: classes with scores, the chosen prompts, and the tasks they come from."""

from dataclasses import dataclass
from typing import Any

import torch
from opening import OpenPool
from PIL import Image
from torch import Tensor

from cl_prompts.methods.shared.per_task import PerTask


TOP = 3  # classes
CHOICES = 6  # prompts of a row; a method that mixes all of them shows the heaviest
ROWS = 8  # layers, or heads of layers


@dataclass(frozen=True)
class Choice:
    """A prompt that was chosen.

    Args:
        prompt: its number in its pool, from 0.
        weight: its score or mixing weight.
        tasks: shares of the tasks that it comes from, by task number; empty if unknown.
    """

    prompt: int
    weight: float
    tasks: dict[int, float]


@dataclass(frozen=True)
class Answer:
    """The pool's answer for one picture.

    Args:
        labels: best classes with their probabilities.
        rows: chosen prompts by the place of the choice ("block 2").
        tasks: shares of the tasks in all chosen prompts.
        routed: the task that the method inferred; None if it infers none.
        unknown: whether the picture is probably of none of the classes; False if the pool cannot tell.
    """

    labels: list[tuple[str, float]]
    rows: list[tuple[str, list[Choice]]]
    tasks: dict[int, float]
    routed: int | None
    unknown: bool = False


def answer(pool: OpenPool, image: Image.Image) -> Answer:
    """Classify one picture; the task is unknown."""
    with torch.no_grad():
        model = pool.model.eval()
        output = model(**pool.pipe.image_processor(images=image, return_tensors="pt"))
        routed = model.chosen_tasks(output)
        names, known = model.adapter.config.state.class_names, model.classes
        scores, columns = output.logits[0].float().softmax(-1).sort(descending=True)
        best = zip(columns[:TOP].tolist(), scores[:TOP].tolist(), strict=True)
        labels = [(names.get(str(known[column]), str(known[column])), score) for column, score in best]
        rows = _rows(model.adapter, output.prompt_ids, output.prompt_weights)
        task = None if routed is None else int(routed[0].flatten().mode().values)
        threshold = model.novelty_threshold
        unknown = threshold is not None and bool(model.novelty(output)[0] > threshold)
    return Answer(labels, rows, _shares([choice for _, choices in rows for choice in choices]), task, unknown)


def _rows(adapter: Any, ids: Tensor | None, weights: Tensor | None) -> list[tuple[str, list[Choice]]]:
    if ids is None:
        return []
    origins = Origins(adapter)
    places = ids.shape[1:-1]
    ids = ids[0].reshape(-1, ids.shape[-1])
    weights = torch.ones_like(ids, dtype=torch.float) if weights is None else weights[0].reshape(ids.shape).float()
    rows = []
    for row in range(min(len(ids), ROWS)):
        order = weights[row].abs().argsort(descending=True, stable=True)[:CHOICES]
        choices = [
            Choice(prompt, weight, origins.of(row, prompt))
            for prompt, weight in zip(ids[row][order].tolist(), weights[row][order].tolist(), strict=True)
        ]
        rows.append((row_name(adapter, places, row), choices))
    return rows


def row_name(adapter: Any, places: torch.Size, row: int) -> str:
    """The place of a choice, like "block 2, head 1"; empty if the whole pool makes one choice.

    Args:
        adapter: the model's `adapter`.
        places: shape of the table of choices: (), (layers,) or (layers, heads).
        row: number in that table, flat.
    """
    if not places:
        return ""
    heads = places[1] if len(places) > 1 else 1
    layers = getattr(adapter.config, "e_layers", None) or adapter.pool.layers
    return f"block {layers[row // heads] + 1}" + (f", head {row % heads + 1}" if heads > 1 else "")


class Origins:
    """The tasks that the prompts of an adapter come from.

    A prompt that a task added belongs to that task. The prompts of a shared pool were chosen by images of several tasks in
    training; the adapter holds counts of these choices.

    Args:
        adapter: the model's `adapter`.
    """

    def __init__(self, adapter: Any) -> None:
        self.made_by = getattr(adapter.config, "components_per_task", None) or (1 if keeps_tasks_apart(adapter) else None)
        self.counts = selection_counts(adapter)

    def of(self, row: int, prompt: int) -> dict[int, float]:
        """Shares by task number; empty if unknown."""
        if self.made_by is not None:
            return {prompt // self.made_by: 1.0}
        if self.counts is None:
            return {}
        chosen = self.counts[:, row, prompt].double()
        return {task: share for task, share in enumerate((chosen / chosen.sum().clamp_min(1)).tolist()) if share}


def keeps_tasks_apart(adapter: Any) -> bool:
    """Whether each task has prompts of its own."""
    return any(isinstance(part, PerTask) for part in adapter.pool.modules())


def selection_counts(adapter: Any) -> Tensor | None:
    """How many images of each task chose each prompt in training [tasks, rows, M]; None if nothing was counted."""
    history = getattr(adapter.pool, "history", None)
    if history is None or not len(history.counts) or not history.counts.any():
        return None
    counts: Tensor = history.counts
    return counts.reshape(len(counts), -1, counts.shape[-1])


def _shares(choices: list[Choice]) -> dict[int, float]:
    """Shares of the tasks, with each choice weighted by its weight."""
    found: dict[int, float] = {}
    for choice in choices:
        for task, share in choice.tasks.items():
            found[task] = found.get(task, 0.0) + share * max(choice.weight, 0.0)
    total = sum(found.values())
    return {task: share / total for task, share in sorted(found.items())} if total else {}
