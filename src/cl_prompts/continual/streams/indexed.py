"""Streams over data sets that give rows by number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_columns
from cl_prompts.continual.streams.indexed_images import IndexedImages
from cl_prompts.continual.streams.loading import (
    Batches,
    Rows,
    build_loader,
    collate,
    has_a_core_to_read,
    process_shards,
)
from cl_prompts.continual.streams.pixels import EightBitTransform, KeptPixels
from cl_prompts.continual.streams.rehearsed_batches import RehearsedBatches
from cl_prompts.continual.streams.stream import Stream, Task


@dataclass(frozen=True, kw_only=True)
class IndexedTask(Task):
    """A task whose images are known by row number.

    Args:
        train_rows: row numbers in the training set of the stream.
        test_rows: row numbers in its test set.
    """

    train_rows: Rows
    test_rows: Rows


class IndexedStream(Stream):
    """A stream over data sets that give rows by number, so that images can be read again in any order.

    Args:
        train: data set with an image column (`datasets.Dataset`, or anything that gives rows by number).
        test: test data set of the same kind.
        tasks: the tasks, at least one.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        train_labels: class id of each row of `train` [rows].
        test_labels: class id of each row of `test` [rows].
        names: class names by id, where known.
        image_column: name of the column of images.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: there are no tasks, a column is missing, or `on_bad_image` is unknown.
    """

    tasks: Sequence[IndexedTask]

    def __init__(
        self,
        train: Any,
        test: Any,
        tasks: Sequence[IndexedTask],
        transform: Callable[[Any], Tensor],
        *,
        train_labels: Rows,
        test_labels: Rows,
        names: Mapping[int, str],
        image_column: str,
        augmentation: CropAndFlip | None,
        on_bad_image: str,
    ) -> None:
        super().__init__(
            tasks,
            transform,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )
        self.train, self.test = train, test
        self.train_labels, self.test_labels = train_labels, test_labels
        for split, data in (("training", train), ("test", test)):
            check_columns(data, [image_column], split)

    def __iter__(self) -> Iterator[IndexedTask]:
        return iter(self.tasks)

    def fingerprint(self) -> str:
        """Sha256 of scenario, tasks, labels, augmentation and seeds."""
        tasks = [[task.number, task.name, task.revisit, task.classes] for task in self.tasks]
        augmentation = asdict(self.augmentation) if self.augmentation else None
        settings = [self.scenario, tasks, augmentation, self._settings()]
        digest = hashlib.sha256(json.dumps(settings).encode())
        arrays = [self.train_labels, self.test_labels]
        for task in self.tasks:
            arrays += [task.train_rows, task.test_rows]
        for array in arrays:
            digest.update(str(len(array)).encode())
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()

    def _settings(self) -> dict[str, Any]:
        """Settings of a scenario that belong into the fingerprint, JSON-able."""
        return {}

    # ---- batches of a task -------------------------------------------------------------------------------------------

    def train_batches(
        self,
        task: Task,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        num_workers: int = 0,
        start: int = 0,
        queries: Tensor | None = None,
        rows: Sequence[int] | Rows | None = None,
        memory_rows: Sequence[int] | Rows | Callable[[], Rows] | None = None,
        memory_batch_size: int = 0,
    ) -> Batches:
        """Training images of a task; see `Stream.train_batches`.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes, without rehearsed ones.
            seed: seed of the order, the augmentation and the rehearsed images.
            epoch: epoch of the task, from 0.
            num_workers: loader processes.
            start: number of steps at the beginning of the epoch to leave out; their images are not read.
            queries: un-prompted features of all training images as this epoch shows them [rows, D]; they become `query` of
                the batches.
            rows: row numbers to use instead of those of the task.
            memory_rows: row numbers of rehearsed images. A function is called before each step, for a memory that changes
                during the epoch; images are then read in this process, whatever `num_workers` is.
            memory_batch_size: number of rehearsed images that are added to each batch, over all processes. They are drawn
                without replacement for each step; all of them if there are fewer.

        Raises:
            ValueError: an argument is out of range, rows are of classes of no task, or `queries` are given although each
                epoch shows new views. During iteration: an image cannot be read or, under `on_bad_image="skip"`, none can.
            TypeError: the task has no row numbers.
        """
        if queries is not None and self.augmentation is not None and self.augmentation.views is None:
            raise ValueError(
                "queries belong to other views of the images, because this stream draws new ones in every epoch: pass "
                "queries=None, or set views in the augmentation"
            )
        used = _indexed(task).train_rows if rows is None else self._check_rows(rows)
        batches = list(process_shards(self._order(task, used, seed, epoch, all_rows=rows is None), batch_size))
        if not 0 <= start <= len(batches):
            raise ValueError(f"start={start}: the epoch has {len(batches)} steps")
        sampler: Sequence[list[int]] | RehearsedBatches = batches[start:]
        if memory_batch_size and memory_rows is not None:
            if callable(memory_rows):
                memory, num_workers = memory_rows, 0  # loader processes would ask for rows ahead of the steps
            else:
                memory = partial(np.asarray, self._check_rows(memory_rows))
            sampler = RehearsedBatches(batches, memory, memory_batch_size, (seed, task.number, epoch), start)
        images = IndexedImages(
            self,
            "train",
            self.train,
            self.train_labels,
            queries=queries,
            augmented_by=None if self.augmentation is None else (seed, epoch),
            replacements=np.sort(used),
            owner=f"task {task.number}" + (f" ({task.name})" if task.name else ""),
        )
        changes = callable(memory_rows) and isinstance(sampler, RehearsedBatches)
        return self._batches(images, sampler, num_workers, ahead=not changes)

    def steps_per_epoch(self, task: Task, batch_size: int, rows: Sequence[int] | Rows | None = None) -> int:
        """Number of batches of `train_batches` with `start=0` and the same `task`, `batch_size` and `rows`.

        Raises:
            TypeError: the task has no row numbers.
        """
        return -(-len(_indexed(task).train_rows if rows is None else rows) // batch_size)

    def test_batches(self, task: Task, batch_size: int, *, num_workers: int = 0, queries: Tensor | None = None) -> Batches:
        """Test images of a task in order; each process gets its part of every batch.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes.
            num_workers: loader processes.
            queries: un-prompted features of all test images [rows, D]; they become `query` of the batches.

        Raises:
            TypeError: the task has no row numbers.
        """
        return self.images(_indexed(task).test_rows, batch_size, train=False, queries=queries, num_workers=num_workers)

    def _order(self, task: Task, rows: Rows, seed: int, epoch: int, *, all_rows: bool) -> Rows:
        """Rows in the order of an epoch; `all_rows`: they are those of the task."""
        return np.random.default_rng([seed, task.number, epoch]).permutation(rows)

    def keep_pixels(self, max_bytes: int, folder: Path | None = None) -> None:
        """Decode and resize each image once from now on, and keep it in 8 bits where that loses nothing.

        The files belong to this process and its forked loader processes, and are gone with them. Images that are augmented
        before the transform, and transforms without a method `resized` (image processors have it), are not kept.

        Args:
            max_bytes: limit on the size of the files of both splits; if the images are larger, they are not kept.
            folder: folder on the disk to use; None: that of temporary files.
        """
        self.kept_pixels = {}
        if not max_bytes or not isinstance(self.transform, EightBitTransform):
            return
        rows = {split: len(self.all_rows(train=split == "train")) for split in ("train", "test")}
        for split, number in rows.items():
            share = max_bytes * number // max(sum(rows.values()), 1)
            with suppress(OSError):  # no room or no right to write there only costs time
                self.kept_pixels[split] = KeptPixels(self.transform, number, share, folder)

    # ---- images by row number ----------------------------------------------------------------------------------------

    def all_rows(self, *, train: bool) -> Rows:
        """Row numbers of the training (`train`) or test images of all tasks, ascending."""
        return np.unique(np.concatenate([task.train_rows if train else task.test_rows for task in self.tasks]))

    def all_images(
        self, *, train: bool, batch_size: int, num_workers: int = 0, augmented_by: tuple[int, int] | None = None
    ) -> Batches:
        """The images of `all_rows(train=train)`, each once; each process gets its part of every batch.

        Args:
            train: training images; False: test images.
            batch_size: images of a batch over all processes.
            num_workers: loader processes.
            augmented_by: (seed, epoch) of the augmentation; None: no augmentation.
        """
        rows = self.all_rows(train=train)
        return self.images(rows, batch_size, train=train, num_workers=num_workers, augmented_by=augmented_by)

    def images(
        self,
        rows: Sequence[int] | Rows,
        batch_size: int,
        *,
        train: bool = True,
        queries: Tensor | None = None,
        num_workers: int = 0,
        augmented_by: tuple[int, int] | None = None,
    ) -> Batches:
        """Images of given rows in order; each process gets its part of every batch.

        Args:
            rows: row numbers.
            batch_size: images of a batch over all processes.
            train: rows of the training set; False: of the test set.
            queries: un-prompted features of all images of that set [rows, D]; they become `query` of the batches.
            num_workers: loader processes.
            augmented_by: (seed, epoch) of the augmentation, of which `augment_on_device` does the part on the device; None:
                no augmentation.

        Raises:
            ValueError: a row is not in the data set, or its class is in no task.
        """
        images = IndexedImages(
            self,
            "train" if train else "test",
            self.train if train else self.test,
            self.train_labels if train else self.test_labels,
            queries=queries,
            augmented_by=augmented_by,
        )
        return self._batches(images, list(process_shards(self._check_rows(rows, train=train), batch_size)), num_workers)

    def _check_rows(self, rows: Sequence[int] | Rows, *, train: bool = True) -> Rows:
        numbers = np.asarray(rows, dtype=np.int64)
        labels = self.train_labels if train else self.test_labels
        outside = numbers[(numbers < 0) | (numbers >= len(labels))]
        if len(outside):
            raise ValueError(f"there is no row {int(outside[0])} among {len(labels)}")
        unknown = sorted(set(labels[numbers].tolist()) - set(self.classes))
        if unknown:
            raise ValueError(f"rows are of classes {unknown}, which no task of this stream has")
        return numbers

    def _batches(
        self,
        images: IndexedImages,
        sampler: Sequence[list[int]] | RehearsedBatches,
        num_workers: int,
        ahead: bool = True,
    ) -> Batches:
        """Batches in this process, or by loader processes; `ahead`: the sampler may be asked before a batch is used."""
        # Another transform may draw random numbers, whose order must not depend on a thread.
        ahead = ahead and not num_workers and isinstance(self.transform, EightBitTransform) and has_a_core_to_read()
        loader = build_loader(images, num_workers, batch_sampler=sampler, collate_fn=collate)
        return Batches(loader, partial(self._record_skipped, images.split), ahead)


def require_indexed(stream: Stream, purpose: str) -> IndexedStream:
    """The `stream`, known to give images by row number.

    Args:
        stream: any stream.
        purpose: what needs row numbers, the subject of the error message.

    Raises:
        ValueError: the stream is read in order.
    """
    if not isinstance(stream, IndexedStream):
        raise ValueError(
            f"{purpose} needs images by row number, and this {stream.scenario} stream is read in order: load the data set "
            "without streaming=True"
        )
    return stream


def _indexed(task: Task) -> IndexedTask:
    if not isinstance(task, IndexedTask):
        raise TypeError(f"task {task.number} has no row numbers: take a task of this stream, stream.tasks[{task.number}]")
    return task
