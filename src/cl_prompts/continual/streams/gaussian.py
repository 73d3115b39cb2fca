"""A stream without task boundaries: classes come and go along Gaussians."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_test_labels, labels_of, names_of
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.scenarios import checked_tasks
from cl_prompts.continual.streams.stream import Stream, Task


class GaussianStream(Stream):
    """Every class has its time around which its images come; one task, no boundary, one pass.

    The Gaussian schedule of Shanahan, Kaplanis & Mitrovic, "Encoders and Ensembles for Task-Free Continual Learning"
    (arXiv:2105.13327), on which L2P reports Gaussian-scheduled CIFAR-100. The centre of the class that is c-th in `classes`
    is (c + 1/2) / C of the way. Each image draws its time from its class's Gaussian, and images come in the order of their
    times: at any time t the next image is of a class with probability proportional to the class's images times
    N(t; centre, width), and every image comes exactly once. (The published code draws a set of classes for each of 200
    short episodes and passes over the images of an episode several times.)

    Args:
        train: data set with an image and a label column.
        test: likewise.
        transform: image -> float tensor [3, H, W], the base's image processor.
        classes: class ids in the order of their centres; None: ascending. Images of other classes are left out.
        width: standard deviation of a class's times, as a share of the stream; published: 50 of 1,000 steps.
        seed: draws the times.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: `width` is not positive, a class comes twice or has no images; columns are missing, or labels are no
            class ids.
    """

    scenario = "gaussian"
    task_free = True

    def __init__(
        self,
        train: Any,
        test: Any,
        transform: Callable[[Any], Tensor],
        *,
        classes: Sequence[int] | None = None,
        width: float = 0.05,
        seed: int = 0,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        if not 0 < width < np.inf:
            raise ValueError(f"width={width} must be a positive share of the stream")
        train_labels = labels_of(train, label_column, "training")
        test_labels = labels_of(test, label_column, "test")
        check_test_labels(train_labels, test_labels)
        (order,) = checked_tasks([sorted(set(train_labels.tolist())) if classes is None else classes])
        for split, labels in (("training", train_labels), ("test", test_labels)):
            absent = sorted(set(order) - set(labels.tolist()))
            if absent:
                raise ValueError(f"classes {absent} have no {split} images")
        self.width, self.seed = width, seed
        rows = np.flatnonzero(np.isin(train_labels, order))
        centres = dict(zip(order, (np.arange(len(order)) + 0.5) / len(order), strict=True))
        middle = np.array([centres[label] for label in train_labels[rows].tolist()])
        times = np.random.default_rng(seed).normal(middle, width)
        test_rows = np.flatnonzero(np.isin(test_labels, order))
        super().__init__(
            train,
            test,
            [Task(0, order, rows[np.argsort(times, kind="stable")], test_rows)],
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names_of(train, label_column),
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )

    def _settings(self) -> dict[str, Any]:
        return {"width": self.width, "seed": self.seed}

    def _order(self, task: Task, rows: Rows, seed: int, epoch: int, *, own: bool) -> Rows:
        if own and epoch:
            raise ValueError(f"epoch={epoch}: a Gaussian stream is passed over once")
        return rows if own else super()._order(task, rows, seed, epoch, own=own)
