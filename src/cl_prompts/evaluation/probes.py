"""Baselines on frozen features: classifiers without prompts, which a prompt method should beat.

They use no prompts and store no images. All take features [N, D] and class ids [N].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.heads import ClassMeans, FeatureClassifier
from cl_prompts.heads.incremental import IncrementalHead


class FrozenFeatures:
    """Features of a stream's images, by task.

    Args:
        train: one (features [N, D], class ids [N]) per task.
        test: one (features [N, D], class ids [N]) per task.
    """

    def __init__(self, train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.train, self.test = list(train), list(test)
        self.classes = [sorted(set(labels.tolist())) for _, labels in self.train]

    @torch.no_grad()
    def accuracies(self, classifier: Callable[[Tensor], Tensor], seen: Sequence[int], tasks: int) -> list[float]:
        """Accuracy in percent on the first `tasks` tasks.

        `classifier` maps features [N, D] to logits, whose columns are the classes `seen`.
        """
        ids = torch.tensor(list(seen))
        return [
            100 * (ids[classifier(features).argmax(1)] == labels).double().mean().item()
            for features, labels in self.test[:tasks]
        ]

    @property
    def sizes(self) -> list[int]:
        """Number of test images of each task."""
        return [len(labels) for _, labels in self.test]


def nearest_class_mean(data: FrozenFeatures) -> AccuracyMatrix:
    """Nearest class mean: predicts the class whose mean training feature has the largest cosine with the image's feature.

    Nothing is trained; `data` has the features.
    """
    matrix = AccuracyMatrix()
    seen: list[int] = []
    means = ClassMeans(data.train[0][0].shape[1])
    for task, (features, labels) in enumerate(data.train):
        seen = list(dict.fromkeys(seen + data.classes[task]))
        means.add(features, _targets(labels, seen), len(seen))
        matrix.add(data.accuracies(means.cosines, seen, task + 1), data.sizes[: task + 1])
    return matrix


def closed_form(data: FrozenFeatures, classifier: FeatureClassifier) -> AccuracyMatrix:
    """A closed-form classifier, fitted to each task's features once. Nothing is trained by gradient descent.

    Args:
        data: features by task.
        classifier: a new classifier for features of this width, with drift "none".
    """
    matrix = AccuracyMatrix()
    seen: list[int] = []
    for task, (features, labels) in enumerate(data.train):
        seen = list(dict.fromkeys(seen + data.classes[task]))
        targets = _targets(labels, seen)
        classifier.begin_task(targets.unique().tolist())
        classifier.fit(features, targets)
        matrix.add(data.accuracies(classifier, seen, task + 1), data.sizes[: task + 1])
    return matrix


def sequential_probe(
    data: FrozenFeatures,
    *,
    num_train_epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    cosine_scale: float | None = None,
) -> AccuracyMatrix:
    """A head trained task after task with Adam. The loss is over the current task's classes, as for prompts by default.

    Args:
        data: features by task.
        num_train_epochs: epochs per task.
        batch_size: features per step.
        learning_rate: learning rate of Adam.
        seed: seed of orders and initial values.
        cosine_scale: scale of a cosine head; None: a linear head.
    """
    matrix = AccuracyMatrix()
    seen: list[int] = []
    head = IncrementalHead(data.train[0][0].shape[1], cosine_scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for task, (features, labels) in enumerate(data.train):
            seen += [c for c in data.classes[task] if c not in seen]
            head.expand(seen, data.classes[task])
            _fit(
                head,
                features,
                labels,
                num_train_epochs=num_train_epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
            )
            matrix.add(data.accuracies(head, seen, task + 1), data.sizes[: task + 1])
    return matrix


def joint_linear_probe(
    data: FrozenFeatures, *, num_train_epochs: int, batch_size: int, learning_rate: float, seed: int
) -> AccuracyMatrix:
    """A new linear head trained on all tasks so far, after each task: an upper bound, which needs old images.

    `data`, `num_train_epochs`, `batch_size`, `learning_rate` and `seed` are as in `sequential_probe`.
    """
    matrix = AccuracyMatrix()
    seen: list[int] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for task in range(len(data.train)):
            seen += [c for c in data.classes[task] if c not in seen]
            features, labels = (torch.cat(parts) for parts in zip(*data.train[: task + 1], strict=True))
            head = IncrementalHead(features.shape[1])
            head.expand(seen, seen)
            _fit(
                head,
                features,
                labels,
                num_train_epochs=num_train_epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
            )
            matrix.add(data.accuracies(head, seen, task + 1), data.sizes[: task + 1])
    return matrix


def _targets(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Index of each label [n] in `classes`: [n]. All labels must be in `classes`."""
    return (labels[:, None] == torch.tensor(list(classes))).int().argmax(1)


def _fit(
    head: IncrementalHead, features: Tensor, labels: Tensor, *, num_train_epochs: int, batch_size: int, learning_rate: float
) -> None:
    targets, _ = head.to_targets(labels)
    optimizer = torch.optim.Adam(head.parameters(), lr=learning_rate)
    for _ in range(num_train_epochs):
        for rows in torch.randperm(len(features)).split(batch_size):
            logits = head(features[rows]).masked_fill(~head.current, float("-inf"))
            loss = F.cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
