"""Further classifiers measured beside the learner's own, on the same features: several heads for one training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.heads import FeatureClassifier
from cl_prompts.learner.features import Recorded, record


NO_SETTINGS = frozenset(vars(nn.Module()))


class SideClassifiers:
    """Classifiers that follow a learner from task to task and change nothing in it.

    Args:
        learner: whose features they read.
        classifiers: by name, new ones.

    Attributes:
        matrices: accuracies of each.
        told: kind and settings of each, as it was handed over.
    """

    def __init__(self, learner: Any, classifiers: Mapping[str, FeatureClassifier]) -> None:
        self.learner, self.classifiers = learner, dict(classifiers)
        self.matrices = {name: AccuracyMatrix() for name in self.classifiers}
        self.told = {name: _told(classifier) for name, classifier in self.classifiers.items()}
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
        columns, _ = head.to_targets(seen.labels)
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


def _told(classifier: FeatureClassifier) -> str:
    """Of each part of a classifier its class, its plain attributes and the shapes of its tensors, as JSON."""
    parts = [
        {
            "name": name,
            "kind": [type(part).__module__, type(part).__qualname__],
            "settings": {key: value for key, value in vars(part).items() if key not in NO_SETTINGS},
            "shapes": {key: list(tensor.shape) for key, tensor in _own_tensors(part).items()},
        }
        for name, part in classifier.named_modules()
    ]
    return json.dumps(parts, sort_keys=True, skipkeys=True, default=_as_text)


def _own_tensors(part: nn.Module) -> dict[str, Tensor]:
    return dict(part.named_parameters(recurse=False)) | dict(part.named_buffers(recurse=False))


def _as_text(value: Any) -> str:
    """What JSON does not know: its text where that is all of it, else only its kind."""
    whole = isinstance(value, np.generic | torch.dtype | torch.device | PurePath)
    return str(value) if whole else type(value).__qualname__
