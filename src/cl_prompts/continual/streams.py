"""Streams of tasks over Hugging Face data sets. The learner sees one task's training images at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


NDArrayInt = np.ndarray[Any, np.dtype[np.int64]]

# Marks images that only fill a batch up: the loss ignores the label, and no count takes the number.
PADDING_LABEL, PADDING_ID = -100, -1


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        number: from 0.
        classes: class ids, as they stand in the labels.
        train_rows, test_rows: row numbers in the stream's data sets.
    """

    number: int
    classes: list[int]
    train_rows: NDArrayInt
    test_rows: NDArrayInt


class ClassIncrementalStream:
    """Each task brings new classes; at test nobody tells the task.

    Args:
        train, test: data sets with an image and a label column (`datasets.Dataset`, or anything that gives rows by
            number and columns by name).
        tasks: class ids of each task, in order.
        transform: image -> float tensor [3, H, W], the base's image processor.
        image_column, label_column: their names.

    Raises:
        ValueError: a class is in two tasks, or has no images in `train` or `test`.
    """

    def __init__(
        self,
        train: Any,
        test: Any,
        tasks: Sequence[Sequence[int]],
        transform: Callable[[Any], Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
    ) -> None:
        self.train, self.test = train, test
        self.transform = transform
        self.image_column, self.label_column = image_column, label_column
        self.train_labels = np.asarray(train[label_column], dtype=np.int64)
        self.test_labels = np.asarray(test[label_column], dtype=np.int64)
        seen: set[int] = set()
        self.tasks: list[Task] = []
        for number, classes in enumerate(tasks):
            again = sorted(seen & set(classes))
            if again:
                raise ValueError(f"task {number} repeats classes {again}: in a class-incremental stream each comes once")
            for name, labels in (("training", self.train_labels), ("test", self.test_labels)):
                absent = sorted(set(classes) - set(labels.tolist()))
                if absent:
                    raise ValueError(f"task {number}: classes {absent} have no {name} images")
            seen |= set(classes)
            rows = [np.flatnonzero(np.isin(labels, classes)) for labels in (self.train_labels, self.test_labels)]
            self.tasks.append(Task(number, [int(c) for c in classes], *rows))

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    def train_batches(
        self, task: Task, batch_size: int, *, seed: int, epoch: int, queries: Tensor | None = None, workers: int = 0
    ) -> DataLoader[dict[str, Any]]:
        """A task's training images in an order that follows from (seed, task, epoch) alone.

        With several processes each gets its share of every global batch of `batch_size` images; a last share that falls
        short is filled up with padding, which counts nowhere.

        Args:
            task: which task.
            batch_size: images of a global batch.
            seed, epoch: choose the order.
            queries: un-prompted features of all training images [rows, D], to be handed to the model.
            workers: loader processes.
        """
        order = np.random.default_rng([seed, task.number, epoch]).permutation(task.train_rows)
        images = LabelledImages(self, train=True, queries=queries)
        return DataLoader(images, batch_sampler=list(shares(order, batch_size)), collate_fn=collate, num_workers=workers)

    def test_batches(self, task: Task, batch_size: int, *, workers: int = 0) -> DataLoader[dict[str, Any]]:
        """A task's test images in order; each process gets its share of every batch."""
        images = LabelledImages(self, train=False)
        batches = list(shares(task.test_rows, batch_size))
        return DataLoader(images, batch_sampler=batches, collate_fn=collate, num_workers=workers)

    def all_images(self, *, train: bool, batch_size: int, workers: int = 0) -> DataLoader[dict[str, Any]]:
        """All images of all tasks' training or test set, for comparison learners; each process gets its share."""
        rows = np.concatenate([task.train_rows if train else task.test_rows for task in self.tasks])
        images = LabelledImages(self, train=train)
        return DataLoader(images, batch_sampler=list(shares(rows, batch_size)), collate_fn=collate, num_workers=workers)


class LabelledImages(Dataset[dict[str, Any]]):
    """Rows of a stream as `pixel_values`, `labels`, `sample_ids` and, where known, `query`.

    A row is asked for by its number, or by -1 - number when it only fills a batch up.
    """

    def __init__(self, stream: ClassIncrementalStream, *, train: bool, queries: Tensor | None = None) -> None:
        self.stream = stream
        self.rows = stream.train if train else stream.test
        self.labels = stream.train_labels if train else stream.test_labels
        self.queries = queries

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index if index >= 0 else -1 - index
        item = {
            "pixel_values": self.stream.transform(self.rows[int(row)][self.stream.image_column]),
            "labels": int(self.labels[row]) if index >= 0 else PADDING_LABEL,
            "sample_ids": int(row) if index >= 0 else PADDING_ID,
        }
        if self.queries is not None:
            item["query"] = self.queries[row]
        return item


def shares(rows: NDArrayInt, batch_size: int) -> Iterator[list[int]]:
    """This process's share of each global batch of `batch_size` rows; all processes get shares of equal length."""
    rank, processes = _rank_and_processes()
    if batch_size % processes:
        raise ValueError(f"a global batch of {batch_size} images does not divide by {processes} processes")
    for start in range(0, len(rows), batch_size):
        batch = [int(row) for row in rows[start : start + batch_size]]
        missing = -len(batch) % processes
        batch += [-1 - batch[i % len(batch)] for i in range(missing)]
        share = len(batch) // processes
        yield batch[rank * share : (rank + 1) * share]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; `sample_ids` stay a list on the host, where they are looked at."""
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "sample_ids": [item["sample_ids"] for item in items],
    }
    if "query" in items[0]:
        batch["query"] = torch.stack([item["query"] for item in items])
    return batch


def split_classes(classes: Sequence[int], tasks: int, seed: int | None = None) -> list[list[int]]:
    """Classes in `tasks` groups of (nearly) equal size, in ascending order or, with a seed, in a random one.

    Raises:
        ValueError: there are more tasks than classes.
    """
    order = sorted(classes)
    if not 1 <= tasks <= len(order):
        raise ValueError(f"{len(order)} classes cannot be split into {tasks} tasks")
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    return [[int(c) for c in part] for part in np.array_split(np.asarray(order), tasks)]


def _rank_and_processes() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
