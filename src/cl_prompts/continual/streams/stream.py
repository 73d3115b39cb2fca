"""Streams of tasks over Hugging Face data sets. The learner sees one task's training images at a time.

The scenarios are in `scenarios.py`, `gaussian.py` and, for data sets that can only be read in order, `streaming.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_columns
from cl_prompts.continual.streams.loading import (
    Batches,
    LabelledImages,
    Rows,
    collate,
    new_loader,
    shares,
)
from cl_prompts.continual.streams.rehearsed_batches import RehearsedBatches
from cl_prompts.runtime.distributed import gather_over_processes


ON_BAD_IMAGE = ("stop", "skip")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        number: from 0.
        classes: class ids, as they stand in the labels.
        train_rows: row numbers in the stream's training set; empty where that can only be read in order.
        test_rows: likewise in its test set.
        name: of its domain or data set; "" where it has none.
        revisit: whether its classes were seen before.
    """

    number: int
    classes: list[int]
    train_rows: Rows
    test_rows: Rows
    name: str = ""
    revisit: bool = False


class Stream:
    """What all scenarios share.

    Args:
        train: data set with an image column (`datasets.Dataset`, or anything that gives rows by number).
        test: likewise.
        tasks: the tasks.
        transform: image -> float tensor [3, H, W], the base's image processor.
        train_labels: class id of each row of `train`.
        test_labels: class id of each row of `test`.
        names: class names by id, where known.
        image_column: its name.
        augmentation: of training images; None: none.
        on_bad_image: what an image that cannot be read does: "stop" raises an error that names it, "skip" leaves it out.

    Attributes:
        task_free: whether the learner is told nothing of tasks.
        random_access: whether images can be had by row number.
        skipped: numbers of the images that this process could not read (after a resume: any process), ascending, under
            "train" and "test".

    Raises:
        ValueError: a task is empty, or labels are not what they should be.
    """

    scenario: ClassVar[str]
    task_free: ClassVar[bool] = False
    random_access: ClassVar[bool] = True

    def __init__(
        self,
        train: Any,
        test: Any,
        tasks: Sequence[Task],
        transform: Callable[[Any], Tensor],
        *,
        train_labels: Rows,
        test_labels: Rows,
        names: Mapping[int, str],
        image_column: str,
        augmentation: CropAndFlip | None,
        on_bad_image: str,
    ) -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={on_bad_image!r}: choose one of {list(ON_BAD_IMAGE)}")
        if not tasks:
            raise ValueError("a stream needs at least one task")
        self.train, self.test = train, test
        self.tasks = list(tasks)
        self.transform = transform
        self.train_labels, self.test_labels = train_labels, test_labels
        self.names = dict(names)
        self.image_column = image_column
        self.augmentation, self.on_bad_image = augmentation, on_bad_image
        self.skipped: dict[str, list[int]] = {"train": [], "test": []}
        for split, rows in (("training", train), ("test", test)):
            check_columns(rows, [image_column], split)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def classes(self) -> list[int]:
        """Class ids of all tasks, in the order in which they first come."""
        return list(dict.fromkeys(c for task in self.tasks for c in task.classes))

    @property
    def augments(self) -> bool:
        """Whether training images are augmented."""
        return self.augmentation is not None

    @property
    def repeats(self) -> bool:
        """Whether what is computed of a training image can be kept: it comes again as it was."""
        return self.augmentation is None or self.augmentation.views is not None

    def cut(self, image: Any, augmented_by: tuple[int, int] | None, number: int) -> Any:
        """An `image` as its transform gets it: the part that `augmented_by`, (seed, epoch), and its `number` draw."""
        if augmented_by is None or self.augmentation is None or self.augmentation.on_device:
            return image
        return self.augmentation.apply(image, *augmented_by, number)

    def cut_on_device(self, batch: dict[str, Any], augmented_by: tuple[int, int] | None) -> dict[str, Any]:
        """A `batch`, on the model's device, as the model gets it: with what `cut` has left to do there.

        `augmented_by` is (seed, epoch), or None.
        """
        if augmented_by is None or self.augmentation is None or not self.augmentation.on_device:
            return batch
        parts = self.augmentation.apply_batch(batch["pixel_values"], *augmented_by, batch["sample_ids"])
        return batch | {"pixel_values": parts}

    def class_names(self, classes: Sequence[int]) -> dict[int, str]:
        """Names of the class ids `classes`, those that the data set knows."""
        return {int(c): self.names[int(c)] for c in classes if int(c) in self.names}

    def fingerprint(self) -> str:
        """Sha256 over all that decides which image comes when: scenario, tasks, labels, augmentation, seeds."""
        tasks = [[task.number, task.name, task.revisit, task.classes] for task in self.tasks]
        augmentation = asdict(self.augmentation) if self.augmentation else None
        told = [self.scenario, tasks, augmentation, self._settings()]
        digest = hashlib.sha256(json.dumps(told).encode())
        arrays = [self.train_labels, self.test_labels]
        for task in self.tasks:
            arrays += [task.train_rows, task.test_rows]
        for array in arrays:
            digest.update(str(len(array)).encode())
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _settings(self) -> dict[str, Any]:
        """What a scenario adds to the fingerprint."""
        return {}

    # ---- batches -----------------------------------------------------------------------------------------------------

    def train_batches(
        self,
        task: Task,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        queries: Tensor | None = None,
        workers: int = 0,
        rows: Sequence[int] | Rows | None = None,
        memory_rows: Sequence[int] | Rows | Callable[[], Rows] | None = None,
        memory_batch_size: int = 0,
        start: int = 0,
    ) -> Batches:
        """A task's training images in an order that follows from (seed, task, epoch) alone.

        With several processes each gets its share of every global batch of `batch_size` images; a last share that falls
        short is filled up with padding, which counts nowhere.

        Args:
            task: which task.
            batch_size: images of a global batch.
            seed: chooses the order, the augmentation and the rehearsed images.
            epoch: so does it.
            queries: un-prompted features of all training images as this epoch shows them [rows, D], to be handed to the
                model.
            workers: loader processes.
            rows: row numbers to take instead of the task's.
            memory_rows: row numbers of rehearsed images, or what gives them before each step, when the memory fills while
                the batches pass: this process then reads the images itself, whatever `workers` is.
            memory_batch_size: how many of them join each global batch, drawn anew for every step without repetition; all
                where there are fewer. Each process gets its share of them behind its share of the batch.
            start: steps of the epoch to leave out; none of their images is read.

        Raises:
            ValueError: an argument is out of range, rows are of no class of the stream, or `queries` are given while images
                are augmented anew in every epoch: they would be those of other images. While the batches pass: an image
                cannot be read or, under `on_bad_image="skip"`, none of the rows can.
        """
        if queries is not None and not self.repeats:
            raise ValueError(
                "queries are those of other images, for this stream augments anew in every epoch: pass queries=None, or "
                "set views in the augmentation"
            )
        taken = task.train_rows if rows is None else self._checked(rows)
        batches = list(shares(self._order(task, taken, seed, epoch, own=rows is None), batch_size))
        if not 0 <= start <= len(batches):
            raise ValueError(f"start={start}: the epoch has {len(batches)} steps")
        rehearsed: Sequence[list[int]] | RehearsedBatches = batches[start:]
        if memory_batch_size and memory_rows is not None:
            if callable(memory_rows):
                remembered, workers = memory_rows, 0  # loader processes would ask ahead of the steps
            else:
                remembered = partial(np.asarray, self._checked(memory_rows))
            rehearsed = RehearsedBatches(batches, remembered, memory_batch_size, (seed, task.number, epoch), start)
        augmented_by = (seed, epoch) if self.augments else None
        images = LabelledImages(
            self,
            train=True,
            queries=queries,
            augmented_by=augmented_by,
            among=np.sort(taken),
            owner=f"task {task.number}" + (f" ({task.name})" if task.name else ""),
        )
        return self._batches(images, rehearsed, workers)

    def steps_per_epoch(self, task: Task, batch_size: int, rows: Sequence[int] | Rows | None = None) -> int:
        """How many batches `train_batches` has from its start, of the same `task`, `batch_size` and `rows`."""
        return -(-len(task.train_rows if rows is None else rows) // batch_size)

    def test_batches(self, task: Task, batch_size: int, *, queries: Tensor | None = None, workers: int = 0) -> Batches:
        """A task's test images in order; each process gets its share of every batch.

        Args:
            task: which task.
            batch_size: images of a batch, over all processes.
            queries: un-prompted features of all test images [rows, D], to be handed to the model.
            workers: loader processes.
        """
        return self.images(task.test_rows, batch_size, train=False, queries=queries, workers=workers)

    def all_rows(self, *, train: bool) -> Rows:
        """Row numbers of all tasks' training (`train`) or test images, ascending: whatever the order of the tasks."""
        return np.unique(np.concatenate([task.train_rows if train else task.test_rows for task in self.tasks]))

    def all_images(
        self, *, train: bool, batch_size: int, workers: int = 0, augmented_by: tuple[int, int] | None = None
    ) -> Batches:
        """The images of `all_rows(train=...)`, each once; each process gets its share.

        Args:
            train: training images instead of test images.
            batch_size: images of a batch, over all processes.
            workers: loader processes.
            augmented_by: (seed, epoch) of the augmentation; None: images as they are.
        """
        rows = self.all_rows(train=train)
        return self.images(rows, batch_size, train=train, workers=workers, augmented_by=augmented_by)

    def images(
        self,
        rows: Sequence[int] | Rows,
        batch_size: int,
        *,
        train: bool = True,
        queries: Tensor | None = None,
        workers: int = 0,
        augmented_by: tuple[int, int] | None = None,
    ) -> Batches:
        """Images of these rows in order; each process gets its share of every batch.

        Args:
            rows: row numbers.
            batch_size: images of a global batch.
            train: in the training or the test set.
            queries: un-prompted features of all images of that set [rows, D], to be handed to the model.
            workers: loader processes.
            augmented_by: (seed, epoch) of the augmentation (`cut`, and then `cut_on_device`); None: none.

        Raises:
            ValueError: a row is not in the data set, or of no class of the stream.
        """
        images = LabelledImages(self, train=train, queries=queries, augmented_by=augmented_by)
        return self._batches(images, list(shares(self._checked(rows, train=train), batch_size)), workers)

    def count_skipped(self) -> int:
        """How many different images could not be read, over all processes, which must all call it."""
        found: set[tuple[str, int]] = set()
        device = "cuda" if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl" else "cpu"
        for split, numbers in self.skipped.items():
            for part in gather_over_processes(torch.tensor(numbers, dtype=torch.int64, device=device)):
                found |= {(split, number) for number in part.tolist()}
        return len(found)

    def _order(self, task: Task, rows: Rows, seed: int, epoch: int, *, own: bool) -> Rows:
        """Rows in the order of an epoch; `own`: they are the task's."""
        return np.random.default_rng([seed, task.number, epoch]).permutation(rows)

    def _checked(self, rows: Sequence[int] | Rows, *, train: bool = True) -> Rows:
        numbers = np.asarray(rows, dtype=np.int64)
        labels = self.train_labels if train else self.test_labels
        outside = numbers[(numbers < 0) | (numbers >= len(labels))]
        if len(outside):
            raise ValueError(f"there is no row {int(outside[0])} among {len(labels)}")
        strange = sorted(set(labels[numbers].tolist()) - set(self.classes))
        if strange:
            raise ValueError(f"rows are of classes {strange}, which no task of this stream has")
        return numbers

    def _batches(self, images: LabelledImages, batches: Sequence[list[int]] | RehearsedBatches, workers: int) -> Batches:
        loader = new_loader(images, workers, batch_sampler=batches, collate_fn=collate)
        return Batches(loader, self._noter(images.split))

    def _noter(self, split: str) -> Callable[[list[int]], None]:
        """Keeps the numbers of unreadable images."""

        def note(numbers: list[int]) -> None:
            if numbers:
                self.skipped[split] = sorted({*self.skipped[split], *numbers})

        return note
