"""Baselines that keep a part of the network for each task."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.base import Baseline
from cl_prompts.learner.nested_tensors import below


class TaskNetworks(Baseline):
    """A baseline in which every task has a network of its own inside the backbone.

    At test each class has the logit that the network of its task gives, so an answer takes a pass for each task. The
    networks were never compared, so these learners need the task of an image (`needs_task`): their task-incremental
    accuracy, over the logits of the image's task, is what their papers report.

    A class may come in several tasks, as with domains. Each of these has rows of the head of its own, which start from
    those of the task before. Without the task, the newest of its networks answers; with `task`, that of the image's task.

    Args:
        backbone: see `Baseline`.
        freeze_backbone: whether the weights are fixed; the learner says which it must be.
        options: see `Baseline`.

    Attributes:
        old_rows: by task, `weight` [n, D] and `bias` [n] of the head for its classes, for tasks of which a class has come
            back since.
    """

    needs_task = True
    fixed_weights = False

    def __init__(self, backbone: nn.Module, *, freeze_backbone: bool | None = None, **options: Any) -> None:
        freeze_backbone = self.fixed_weights if freeze_backbone is None else freeze_backbone
        if freeze_backbone != self.fixed_weights:
            raise ValueError(f"freeze_backbone={freeze_backbone!r}: {self.name!r} needs {self.fixed_weights}, leave it out")
        super().__init__(backbone, freeze_backbone=freeze_backbone, **options)
        self.old_rows: dict[int, dict[str, Tensor]] = {}

    @abstractmethod
    def network(self, task: int) -> AbstractContextManager[None]:
        """Within this context, and in this thread only, the backbone computes what the network of `task` does."""

    def before_task(self, classes: Sequence[int]) -> None:
        """Keep the head's rows of tasks of which one of the `classes` of the next task comes back."""
        tasks = self.tasks.state.tasks
        for task, columns in enumerate(self.tasks.class_indices(tasks)):
            if task not in self.old_rows and set(tasks[task]) & set(classes):
                rows = {name: p.detach()[columns].clone() for name, p in self.head.named_parameters()}
                self.old_rows[task] = rows

    def network_logits(self, pixel_values: Tensor, task: int, **kwargs: Any) -> Tensor:
        """Logits [B, n] of images [B, 3, H, W] for the n classes of `task` by its network; `kwargs` go to the backbone."""
        with self.network(task):
            features = self.features(pixel_values, **kwargs)
        rows = self.old_rows.get(task)
        if rows is None:
            return self.logits_of(features)[:, self.columns(task)]
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), rows["weight"].to(features.device), rows["bias"].to(features.device))

    def columns(self, task: int) -> list[int]:
        """Indices of the logits of the classes of `task`."""
        return self.tasks.class_indices(self.tasks.state.tasks[task : task + 1])[0]

    @property
    def needs_query(self) -> bool:
        """False: features of the whole backbone are not used."""
        return False

    def compute_features(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of `pixel_values` by the newest task's network; arguments as in `Baseline`.

        Raises:
            ValueError: `query` is given, or gradient checkpointing is on in training.
        """
        if query is not None:
            raise ValueError("query holds features of the whole backbone, which this learner does not use: leave it out")
        self.refuse_checkpointing()
        with self.network(self.num_tasks - 1):
            return self.features(pixel_values, **kwargs)

    def answer(
        self, pixel_values: Tensor, features: Tensor, logits: Tensor, *, task: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Logits at test [B, C]; arguments as in `Baseline`.

        Each class is answered by the network of `task` if it is one of that task's, or by that of the newest task that has
        it.

        Raises:
            ValueError: no such task has begun.
        """
        if task is not None and not 0 <= task < self.num_tasks:
            raise ValueError(f"task={task} must be one of the {self.num_tasks} tasks so far, numbered from 0")
        order = [*range(self.num_tasks), *([] if task is None else [task])]
        owner = {column: number for number in order for column in self.columns(number)}
        found = logits.clone()
        for number in sorted(set(owner.values()) - {self.num_tasks - 1}):
            own = self.network_logits(pixel_values, number, **kwargs)
            kept = [place for place, column in enumerate(self.columns(number)) if owner[column] == number]
            found[:, [self.columns(number)[place] for place in kept]] = own[:, kept]
        return found

    def current_rows(self) -> dict[str, Tensor]:
        """Update factors that freeze the head's rows of classes that are not in the current task."""
        current = self.head.current.float()
        return {"head.weight": current[:, None], "head.bias": current}

    def extra_tensors(self) -> dict[str, Tensor]:
        """The rows of the head of tasks of which a class has come back."""
        return {f"rows.{task}.{name}": row for task, rows in self.old_rows.items() for name, row in rows.items()}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        self.old_rows = {}
        for key, row in below("rows.", tensors).items():
            task, name = key.split(".")
            self.old_rows.setdefault(int(task), {})[name] = row
