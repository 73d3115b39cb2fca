"""Further classifiers measured beside the learner's own, on the same features: several heads for one training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cl_prompts.classifiers import FeatureClassifier
from cl_prompts.continual.evaluation import Evaluation
from cl_prompts.continual.metrics import AccuracyMatrix
from cl_prompts.features import Recorded, record


class SideClassifiers:
    """Classifiers that follow a learner from task to task and change nothing in it.

    Args:
        learner: whose features they read.
        classifiers: by name, new ones.

    Attributes:
        matrices: accuracies of each.
    """

    def __init__(self, learner: Any, classifiers: Mapping[str, FeatureClassifier]) -> None:
        self.learner, self.classifiers = learner, dict(classifiers)
        self.matrices = {name: AccuracyMatrix() for name in self.classifiers}
        self._recorded: Recorded | None = None
        self._tasks: list[list[int]] = []  # head columns of each task they have seen

    @property
    def needs_before(self) -> bool:
        """Whether one of them compensates drift."""
        return any(classifier.needs_before for classifier in self.classifiers.values())

    def record(self, images: Iterable[Mapping[str, Any]]) -> None:
        """See a task's images before it begins."""
        self._recorded = record(self.learner.features_of, images)

    def fit(self, images: Iterable[Mapping[str, Any]]) -> None:
        """See a task's images when its training is done."""
        if not self.classifiers:
            return
        seen, head = record(self.learner.features_of, images), self.learner.head
        columns, _ = head.to_columns(seen.labels)
        self._tasks.append(head.current.nonzero().flatten().tolist())
        before = None if self._recorded is None else self._recorded.features_of(seen)
        for classifier in self.classifiers.values():
            classifier.to(seen.features.device).begin_task(self._tasks[-1])
            classifier.fit(seen.features, columns, before if classifier.needs_before else None, head)
        self._recorded = None

    def add(self, measured: list[Evaluation]) -> None:
        """Take over their accuracies on all tasks so far."""
        for name, matrix in self.matrices.items():
            matrix.add([m.by_classifier[name] for m in measured], [m.images for m in measured])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able values for a checkpoint."""
        tensors = {
            f"{name}.{key}": tensor
            for name, classifier in self.classifiers.items()
            for key, tensor in classifier.named_buffers()
            if not key.startswith("head.")  # a copy made anew after every task
        }
        if self._recorded is not None:
            tensors |= {f"recorded.{field.name}": getattr(self._recorded, field.name) for field in fields(Recorded)}
        matrices = {name: matrix.to_dict() for name, matrix in self.matrices.items()}
        return tensors, {"tasks": self._tasks, "matrices": matrices}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, with classifiers that are new."""
        self._tasks = [list(task) for task in values["tasks"]]
        self.matrices = {name: AccuracyMatrix.from_dict(matrix) for name, matrix in values["matrices"].items()}
        for name, classifier in self.classifiers.items():
            for task in self._tasks:
                classifier.begin_task(task)  # shapes only; numbers follow
            if self._tasks:
                classifier.make_room()
            for key, buffer in classifier.named_buffers():
                buffer.copy_(tensors[f"{name}.{key}"])
        if "recorded.ids" in tensors:
            self._recorded = Recorded(*(tensors[f"recorded.{field.name}"] for field in fields(Recorded)))
