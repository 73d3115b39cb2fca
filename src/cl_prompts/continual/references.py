"""Comparison learners on the same frozen features; a prompt method is worth its cost only where it beats them.

None of them prompts the backbone or keeps images. All take features [N, D] and class ids [N].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.continual.metrics import AccuracyMatrix


REFERENCES = ("sequential linear probe", "nearest class mean", "joint linear probe")


class FrozenFeatures:
    """Features of a stream's images, cut by task.

    Args:
        train, test: one (features [N, D], class ids [N]) per task.
    """

    def __init__(self, train: Sequence[tuple[Tensor, Tensor]], test: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.train, self.test = list(train), list(test)
        self.classes = [sorted(set(labels.tolist())) for _, labels in self.train]

    def accuracies(self, weight: Tensor, bias: Tensor, seen: Sequence[int], tasks: int) -> list[float]:
        """Accuracy in percent on the first `tasks` tasks of a linear classifier whose rows are the classes `seen`."""
        ids = torch.tensor(list(seen))
        return [
            100 * (ids[F.linear(features, weight, bias).argmax(1)] == labels).double().mean().item()
            for features, labels in self.test[:tasks]
        ]

    @property
    def sizes(self) -> list[int]:
        """Number of test images of each task."""
        return [len(labels) for _, labels in self.test]


def nearest_class_mean(data: FrozenFeatures) -> AccuracyMatrix:
    """The class whose mean training feature has the largest cosine; nothing is trained."""
    matrix, seen, means = AccuracyMatrix(), [], []
    for task, (features, labels) in enumerate(data.train):
        for c in data.classes[task]:
            seen.append(c)
            means.append(F.normalize(features[labels == c].mean(0), dim=0))
        weight = torch.stack(means)
        accuracies = data.accuracies(weight, weight.new_zeros(len(seen)), seen, task + 1)
        matrix.add(accuracies, data.sizes[: task + 1])
    return matrix


def sequential_linear_probe(
    data: FrozenFeatures, *, epochs: int, batch_size: int, lr: float, seed: int
) -> AccuracyMatrix:
    """A linear head trained task after task with Adam; the loss sees the current task's classes, as for the prompts."""
    matrix, seen = AccuracyMatrix(), [c for task in data.classes for c in task]
    head = _head(data.train[0][0].shape[1], len(seen), seed)
    for task, (features, labels) in enumerate(data.train):
        _fit(head, features, labels, data.classes[task], seen, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
        known = sum(len(c) for c in data.classes[: task + 1])
        with torch.no_grad():
            accuracies = data.accuracies(head.weight[:known], head.bias[:known], seen[:known], task + 1)
        matrix.add(accuracies, data.sizes[: task + 1])
    return matrix


def joint_linear_probe(data: FrozenFeatures, *, epochs: int, batch_size: int, lr: float, seed: int) -> AccuracyMatrix:
    """A linear head trained on all tasks so far at once, anew after each task: what no continual learner may do."""
    matrix = AccuracyMatrix()
    for task in range(len(data.train)):
        seen = [c for classes in data.classes[: task + 1] for c in classes]
        features, labels = (torch.cat(parts) for parts in zip(*data.train[: task + 1], strict=True))
        head = _head(features.shape[1], len(seen), seed)
        _fit(head, features, labels, seen, seen, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
        with torch.no_grad():
            accuracies = data.accuracies(head.weight, head.bias, seen, task + 1)
        matrix.add(accuracies, data.sizes[: task + 1])
    return matrix


def _head(width: int, classes: int, seed: int) -> nn.Linear:
    head = nn.Linear(width, classes)
    generator = torch.Generator().manual_seed(seed)
    nn.init.trunc_normal_(head.weight, std=0.02, a=-0.04, b=0.04, generator=generator)
    nn.init.zeros_(head.bias)
    return head


def _fit(
    head: nn.Linear,
    features: Tensor,
    labels: Tensor,
    current: Sequence[int],
    seen: Sequence[int],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    column = {c: i for i, c in enumerate(seen)}
    targets = torch.tensor([column[int(label)] for label in labels])
    hidden = torch.ones(len(seen), dtype=torch.bool)
    hidden[[column[c] for c in current]] = False
    optimizer = torch.optim.Adam(head.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(features), generator=generator).split(batch_size):
            loss = F.cross_entropy(head(features[rows]).masked_fill(hidden, float("-inf")), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
