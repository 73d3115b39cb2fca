"""Extra classifiers, fitted and evaluated on the features of one trained learner."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
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
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.text import short_repr


NO_SETTINGS = frozenset(vars(nn.Module()))


class ExtraClassifiers:
    """Classifiers fitted on a learner's features after each task. They do not change the learner.

    Args:
        learner: the learner whose features are used.
        classifiers: new classifiers by name.

    Attributes:
        matrices: accuracies of each classifier.
        settings: class and settings of each classifier at the start, as JSON.
    """

    def __init__(self, learner: Learner, classifiers: Mapping[str, FeatureClassifier]) -> None:
        self.learner, self.classifiers = learner, dict(classifiers)
        self.matrices = {name: AccuracyMatrix() for name in self.classifiers}
        self.settings = {name: _settings_of(classifier) for name, classifier in self.classifiers.items()}
        self._recorded: Recorded | None = None
        self._tasks: list[list[int]] = []  # class indices of each task that they were fitted to
        self._classes: list[int] = []  # class id of each of their columns

    @property
    def needs_before(self) -> bool:
        """Whether a classifier compensates drift, so that `record` must be called."""
        return any(classifier.needs_before for classifier in self.classifiers.values())

    def record(self, images: Iterable[Mapping[str, Any]]) -> None:
        """Record the features of a task's images before the task begins, if a classifier needs them.

        Raises:
            ValueError: classes of the learner were forgotten or merged since the last fit.
        """
        self._check_classes()
        if self.needs_before:
            self._recorded = record(self.learner.features_of, images)

    def fit(self, images: Iterable[Mapping[str, Any]]) -> None:
        """Fit all classifiers to the features of a task's images after its training.

        Raises:
            ValueError: as `record`.
        """
        if not self.classifiers:
            return
        self._check_classes()
        seen, head = record(self.learner.features_of, images), self.learner.head
        columns, _ = head.to_targets(seen.labels)
        self._tasks.append(head.current.nonzero().flatten().tolist())
        self._classes = list(self.learner.classes)
        before = None if self._recorded is None else self._recorded.features_of(seen)
        for classifier in self.classifiers.values():
            classifier.to(seen.features.device).begin_task(self._tasks[-1])
            classifier.fit(seen.features, columns, before if classifier.needs_before else None, head)
        self._recorded = None

    def _check_classes(self) -> None:
        now = list(self.learner.classes)
        if now[: len(self._classes)] != self._classes:
            raise ValueError(
                f"extra classifiers {list(self.classifiers)} know classes {short_repr(self._classes)}, the learner "
                f"{short_repr(now)}: they cannot follow classes that are forgotten or merged within a run; change classes "
                "after it"
            )

    def add(self, evaluations: Sequence[Evaluation]) -> None:
        """Add a column to each matrix: the accuracies on all tasks so far."""
        for name, matrix in self.matrices.items():
            matrix.add([e.by_classifier[name] for e in evaluations], [e.images for e in evaluations])
            explained = self.classifiers[name].drift_explained
            if explained is not None:
                matrix.drift[len(evaluations) - 1] = explained

    def state_dict(self) -> dict[str, Any]:
        """Buffers, recorded features, tasks and matrices, for a checkpoint."""
        recorded = self._recorded
        return {
            "classifiers": {name: _own_buffers(classifier) for name, classifier in self.classifiers.items()},
            "recorded": None if recorded is None else {f.name: getattr(recorded, f.name) for f in fields(Recorded)},
            "tasks": self._tasks,
            "classes": self._classes,
            "matrices": {name: matrix.state_dict() for name, matrix in self.matrices.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load `state` into new classifiers."""
        self._tasks, self._classes = [list(task) for task in state["tasks"]], list(state["classes"])
        for name, matrix in self.matrices.items():
            matrix.load_state_dict(state["matrices"][name])
        for name, classifier in self.classifiers.items():
            for task in self._tasks:
                classifier.begin_task(task)  # for the shapes; the values are copied below
            if self._tasks:
                classifier.make_room()
            for key, buffer in classifier.named_buffers():
                buffer.copy_(state["classifiers"][name][key])
        self._recorded = None if state["recorded"] is None else Recorded(**state["recorded"])


def _own_buffers(classifier: FeatureClassifier) -> dict[str, Tensor]:
    """Buffers except those of the copy of the learner's head, which is replaced after every task."""
    return {key: tensor for key, tensor in classifier.named_buffers() if not key.startswith("head.")}


def _settings_of(classifier: FeatureClassifier) -> str:
    """Class, plain attributes and shapes of the tensors of each part of a classifier, as JSON."""
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
    """Text for a value that JSON cannot hold: `str(value)` for types whose text is complete, else the type's name."""
    complete = isinstance(value, np.generic | torch.dtype | torch.device | PurePath)
    return str(value) if complete else type(value).__qualname__
