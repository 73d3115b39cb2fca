"""A stream in which classes appear and disappear on a Gaussian schedule, without task boundaries or cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.data_sets import as_rows
from cl_prompts.continual.streams.indexed import IndexedStream, IndexedTask
from cl_prompts.continual.streams.labels import check_test_labels, common_class_names, read_labels, validate_tasks
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.scenarios import rows_of_classes
from cl_prompts.continual.streams.stream import Task


class GaussianStream(IndexedStream):
    """The images of a class come around a time of its own: in one task without boundaries and one epoch, or in parts.

    The Gaussian schedule of Shanahan, Kaplanis & Mitrovic, "Encoders and Ensembles for Task-Free Continual Learning"
    (arXiv:2105.13327), with which L2P reports Gaussian-scheduled CIFAR-100. Time runs from 0 to 1. The center of the c-th
    of C classes is (c + 1/2) / C. Each image draws a time from the Gaussian of its class, and images come in the order of
    their times: at time t the next image is of a class with probability proportional to the number of its images times
    N(t; center, width), and every image comes exactly once. The published code instead draws a set of classes for each of
    200 short episodes and iterates several times over the images of an episode.

    With `parts` the stream is cut into so many parts of equal length, each a task (ours): for learners that do something
    when a task ends, like heads made from class statistics. Images of a part come in a random order and may be read again
    until it ends. A class is in every part that has images of it; its test images are those of the part with most of them.

    Args:
        train: data set with images and labels; see `as_rows` for the accepted kinds.
        test: test data set.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        classes: class ids or class names in the order of their centers; None: ascending. Images of other classes are left
            out.
        width: standard deviation of the times of a class, as a fraction of the stream; published: 50 of 1,000 steps.
        seed: seed of the times.
        parts: number of parts; 1: no task boundaries.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: `width` is not positive, a class is given twice or has no images, a part has most of the images of no
            class, a column is missing, or labels are no class ids.
    """

    scenario = "gaussian"

    def __init__(
        self,
        train: Any,
        test: Any,
        transform: Callable[[Any], Tensor],
        *,
        classes: Sequence[int] | None = None,
        width: float = 0.05,
        seed: int = 0,
        parts: int = 1,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        if not 0 < width < np.inf:
            raise ValueError(f"width={width} must be a positive fraction of the stream")
        train = as_rows(train, image_column, label_column, "training")
        test = as_rows(test, image_column, label_column, "test")
        names = common_class_names([train], [test], label_column)
        train_labels = read_labels(train, label_column, "training", names)
        test_labels = read_labels(test, label_column, "test", names)
        check_test_labels(train_labels, test_labels)
        (order,) = validate_tasks([sorted(set(train_labels.tolist())) if classes is None else classes], names)
        self.width, self.seed = width, seed
        rows = rows_of_classes(train_labels, order, "training")
        centers = dict(zip(order, (np.arange(len(order)) + 0.5) / len(order), strict=True))
        center_of_row = np.array([centers[label] for label in train_labels[rows].tolist()])
        times = np.random.default_rng(seed).normal(center_of_row, width)
        self.task_free = parts == 1
        in_time = rows[np.argsort(times, kind="stable")]
        super().__init__(
            train,
            test,
            _tasks(in_time, train_labels, test_labels, order, parts),
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )

    def _settings(self) -> dict[str, Any]:
        return {"width": self.width, "seed": self.seed}  # parts are tasks, which the fingerprint has

    def _order(self, task: Task, rows: Rows, seed: int, epoch: int, *, all_rows: bool) -> Rows:
        if not self.task_free:
            return super()._order(task, rows, seed, epoch, all_rows=all_rows)
        if all_rows and epoch:
            raise ValueError(f"epoch={epoch}: a Gaussian stream has one epoch")
        return rows if all_rows else super()._order(task, rows, seed, epoch, all_rows=False)


def _tasks(in_time: Rows, train_labels: Rows, test_labels: Rows, order: Sequence[int], parts: int) -> list[IndexedTask]:
    """The parts of a stream.

    Args:
        in_time: row numbers of the training images in the order of their times.
        train_labels: class id of each training row.
        test_labels: class id of each test row.
        order: class ids in the order of their centers.
        parts: number of parts.

    Raises:
        ValueError: `parts` is no positive integer, or a part has most of the images of no class.
    """
    if isinstance(parts, bool) or not isinstance(parts, int) or parts < 1:
        raise ValueError(f"parts={parts!r} must be an integer of at least 1")
    pieces = np.array_split(in_time, parts)
    counts = np.array([[np.count_nonzero(train_labels[rows] == c) for c in order] for rows in pieces])
    home = counts.argmax(0)  # the first of equal ones
    tasks: list[IndexedTask] = []
    for number, rows in enumerate(pieces):
        classes = [c for c, count in zip(order, counts[number], strict=True) if count]
        tested = [c for c, part in zip(order, home, strict=True) if part == number]
        if not tested:
            raise ValueError(f"parts={parts}: part {number} has most of the images of no class: choose fewer parts")
        revisit = bool(counts[:number, counts[number] > 0].any())
        test_rows = rows_of_classes(test_labels, tested, "test")
        tasks.append(IndexedTask(number, classes, revisit=revisit, train_rows=rows, test_rows=test_rows))
    return tasks
