"""Classifiers on the same frozen features; a prompt method is worth its cost only where it beats them.

None of them prompts the backbone or keeps images. All take features [N, D] and class ids [N].
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
    """Features of a stream's images, cut by task.

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

        `classifier` makes logits of features; its columns are the classes `seen`.
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
    """The class whose mean training feature, over all tasks so far, has the largest cosine with the image's.

    Nothing is trained; `data` are the features.
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
    """A new classifier in closed form, shown each task's features once; nothing is trained.

    Args:
        data: features by task.
        classifier: for their width; drift is none.
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
    """A head trained task after task with Adam; the loss sees the current task's classes, as for the prompts.

    Args:
        data: features by task.
        num_train_epochs: of a task, as for the prompts.
        batch_size: features of a step.
        learning_rate: of Adam.
        seed: of the order and the initial values.
        cosine_scale: None for a linear head, else the scale of a cosine head.
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
    """A linear head trained on all tasks so far at once, anew after each task: what no continual learner may do.

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
    """The place of each label [n] in `classes`, which has all of them: [n]."""
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
