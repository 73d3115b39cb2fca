"""Streams over data sets that can only be read in order (`datasets.IterableDataset`, `load_dataset(streaming=True)`).

Every process and every loader process iterates over the whole source and decodes only its own part. The batches therefore
equal those of one process without loader processes, image by image. Dividing the shards of a source among processes would
give other batches, and processes with different numbers of images. Each epoch of a task is one more pass over the source.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Image, IterableDataset
from PIL import Image as PILImage
from torch import Tensor
from torch.utils.data import get_worker_info

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_columns
from cl_prompts.continual.streams.data_sets import with_image_column
from cl_prompts.continual.streams.image_column import decode_cell
from cl_prompts.continual.streams.indexed_images import IndexedImages
from cl_prompts.continual.streams.labels import label_ids
from cl_prompts.continual.streams.loading import (
    PADDING_ID,
    Batches,
    Rows,
    build_loader,
    collate,
    process_shard,
    process_shards,
    rank_and_processes,
    unreadable_error,
)
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.images import UnreadableImage


_INTERLEAVES_SHARDS = "max_buffer_input_shards" in inspect.signature(IterableDataset.shuffle).parameters


@dataclass(frozen=True)
class IndexedTestSet:
    """A test set with rows by number, for a stream whose training images are read in order.

    Args:
        data: data set with the stream's image column.
        labels: class id of each row [rows].
        rows: row numbers of the test images of each task.
    """

    data: Any
    labels: Rows
    rows: Sequence[Rows]


class IterableStream(Stream):
    """A stream whose training images are read in order.

    It cannot give images by row number, so it supports neither rehearsal nor cached queries. The id of an image
    (`sample_ids`) is a hash of the content of its file, the same in every epoch.

    Args:
        train_sources: training images of each task, not decoded (`without_decoding`).
        test: test images of each task, not decoded, or an `IndexedTestSet`.
        tasks: the tasks, at least one.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        names: class names by id, where known.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.
        buffer_size: size of the shuffle buffer from which training images are drawn; 0: the order of the source.
        train_images: number of training images of each task, if known; without it the number of steps is unknown.

    Raises:
        ValueError: `train_images` are not one positive number for each task.
    """

    def __init__(
        self,
        train_sources: Sequence[IterableDataset],
        test: Sequence[IterableDataset] | IndexedTestSet,
        tasks: Sequence[Task],
        transform: Callable[[Any], Tensor],
        *,
        names: Mapping[int, str],
        image_column: str,
        label_column: str,
        augmentation: CropAndFlip | None,
        on_bad_image: str,
        buffer_size: int,
        train_images: Sequence[int] | None,
    ) -> None:
        super().__init__(
            tasks,
            transform,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )
        if train_images is not None and (len(train_images) != len(tasks) or min(train_images) < 1):
            raise ValueError(f"train_images={list(train_images)}: give a positive number for each of {len(tasks)} tasks")
        if isinstance(test, IndexedTestSet):
            check_columns(test.data, [image_column], "test")
        self.train_sources, self.test = list(train_sources), test
        self.label_ids = label_ids(self.classes, self.names)
        self.label_column, self.buffer_size = label_column, buffer_size
        self.train_images = None if train_images is None else [int(n) for n in train_images]

    def fingerprint(self) -> str:
        """Sha256 of what is known without reading the sources: scenario, tasks, augmentation and settings."""
        tasks = [[task.number, task.name, task.revisit, task.classes] for task in self.tasks]
        known = [self.scenario, tasks, repr(self.augmentation), self.buffer_size, self.train_images, self.label_column]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    def train_batches(
        self, task: Task, batch_size: int, *, seed: int, epoch: int, num_workers: int = 0, start: int = 0
    ) -> Batches:
        """See `Stream.train_batches`. The order depends on `buffer_size` too. Images before `start` are not decoded."""
        source = self.train_sources[task.number]
        if self.buffer_size:
            random = np.random.default_rng([seed, task.number, epoch])
            # One shard at a time: datasets 5.2 sleeps for five seconds after a pass over interleaved shards. Older
            # versions do nothing else.
            one_shard = {"max_buffer_input_shards": 1} if _INTERLEAVES_SHARDS else {}
            source = source.shuffle(generator=random, buffer_size=self.buffer_size, **one_shard)
        images = StreamedImages(
            self,
            source,
            "train",
            batch_size,
            classes=task.classes,
            start=start,
            expected=None if self.train_images is None else self.train_images[task.number],
            augmented_by=None if self.augmentation is None else (seed, epoch),
        )
        return self._batches(images, num_workers, batch_size=None, collate_fn=_identity)

    def steps_per_epoch(self, task: Task, batch_size: int) -> int:
        """Number of batches of an epoch, from `train_images`.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes.

        Raises:
            ValueError: `train_images` is None.
        """
        if self.train_images is None:
            raise ValueError(
                "the images of an IterableDataset cannot be counted before they are read: give train_images, the number of "
                "training images of each task"
            )
        return -(-self.train_images[task.number] // batch_size)

    def test_batches(self, task: Task, batch_size: int, *, num_workers: int = 0) -> Batches:
        """Test images of a task in order; each process gets its part of every batch."""
        if isinstance(self.test, IndexedTestSet):
            indexed = IndexedImages(self, "test", self.test.data, self.test.labels)
            sampler = list(process_shards(self.test.rows[task.number], batch_size))
            return self._batches(indexed, num_workers, batch_sampler=sampler, collate_fn=collate)
        streamed = StreamedImages(self, self.test[task.number], "test", batch_size, classes=task.classes)
        return self._batches(streamed, num_workers, batch_size=None, collate_fn=_identity)

    def _batches(self, images: IndexedImages | StreamedImages, num_workers: int, **options: Any) -> Batches:
        return Batches(build_loader(images, num_workers, **options), partial(self._record_skipped, images.split))


class StreamedImages(torch.utils.data.IterableDataset[dict[str, Any]]):
    """One pass over a source, as this process's shard of each global batch.

    Args:
        stream: gives transform, augmentation, classes and `on_bad_image`.
        source: images of one task, not decoded, in the order of the pass.
        split: "train" or "test".
        batch_size: images of a batch over all processes.
        classes: class ids that the pass must have images of.
        start: number of batches at the beginning to leave out; their images are not decoded.
        expected: number of images of the whole pass, if known.
        augmented_by: (seed, epoch) of the augmentation; None: no augmentation.

    Raises:
        ValueError: `batch_size` is not positive or does not divide by the number of processes. During iteration: there are
            no images, none of a class or not as many as expected, none can be read, or a label is not among the classes.
    """

    def __init__(
        self,
        stream: IterableStream,
        source: IterableDataset,
        split: str,
        batch_size: int,
        *,
        classes: Sequence[int] = (),
        start: int = 0,
        expected: int | None = None,
        augmented_by: tuple[int, int] | None = None,
    ) -> None:
        self.rank, self.processes = rank_and_processes()
        if batch_size < 1 or batch_size % self.processes:
            raise ValueError(f"a global batch of {batch_size} images does not divide by {self.processes} processes")
        self.stream, self.source, self.split = stream, source, split
        self.batch_size, self.start = batch_size, start
        self.mode = source.features[stream.image_column].mode
        self.classes, self.expected, self.augmented_by = classes, expected, augmented_by

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readable = False
        for step, batch in enumerate(self._global_batches()):
            if step >= self.start and (step - self.start) % num_workers == worker:
                pairs = [(example, True) for example in batch]
                shard = process_shard(pairs, self.rank, self.processes, lambda pair: (pair[0], False))
                items = [self._item(example, real) for example, real in shard]
                readable = readable or any(item["unreadable"] is None for item in items)
                yield self._batch(items)
        if not readable:  # no image of this shard, but perhaps one of another
            self._require_readable()

    def _require_readable(self) -> None:
        """Raise ValueError if no image of the source can be read."""
        unreadable = 0
        for batch in self._global_batches():
            for example in batch:
                if self._item(example, True)["unreadable"] is None:
                    return
                unreadable += 1
        raise ValueError(f"none of the {unreadable} {self.split} images of this task can be read: repair some")

    def _global_batches(self) -> Iterator[list[dict[str, Any]]]:
        count, batch, seen = 0, [], set()
        # Unlike iteration, iter() gives every loader process the whole source instead of its own shards.
        for columns in self.source.iter(batch_size=32):
            for values in zip(*columns.values(), strict=True):
                batch.append(dict(zip(columns, values, strict=True)))
                seen.add(self._class_id(batch[-1]))
                count += 1
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch
        if not count or self.expected not in (None, count):
            wanted = "" if self.expected is None else f", not the {self.expected} of train_images"
            raise ValueError(f"the pass over the {self.split} set gave {count} images{wanted}")
        if absent := [self.stream.names.get(c, c) for c in self.classes if c not in seen]:
            raise ValueError(f"the pass over the {self.split} set gave no images of classes {absent}: spell them alike")

    def _class_id(self, example: dict[str, Any]) -> int | None:
        label = example[self.stream.label_column]
        return self.stream.label_ids.get(label) if isinstance(label, Hashable) else None

    def _batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch in which another image, or a black one, takes the place of each unreadable image."""
        images = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if len(images) < len(items):
            replacement = images[0] if images else self.stream.pixels(_black())
            items = [item if item["pixel_values"] is not None else item | {"pixel_values": replacement} for item in items]
        return collate(items)

    def _item(self, example: dict[str, Any], real: bool) -> dict[str, Any]:
        """An example as an item of a batch; `pixel_values` is None if it cannot be read. `real`: it is no padding."""
        cell, label = example[self.stream.image_column], example[self.stream.label_column]
        class_id = self._class_id(example)
        if class_id is None:
            raise ValueError(
                f"a {self.split} image has label {label!r}, and the stream's classes are {self.stream.classes}"
            )
        number = content_id(cell)
        padding = {"labels": IGNORE_INDEX, "sample_ids": PADDING_ID}
        try:
            image = decode_cell(cell, self.mode, self.stream.max_pixels)
        except UnreadableImage as error:
            if self.stream.on_bad_image == "stop":
                file = (cell or {}).get("path")
                raise unreadable_error(f"{self.split} file {file}, label {label},", error) from error
            return {"pixel_values": None, "unreadable": number, **padding}
        image = self.stream.pixels(self.stream.augment(image, self.augmented_by, number))
        numbers = {"labels": class_id, "sample_ids": number} if real else padding
        return {"pixel_values": image, "unreadable": None, **numbers}


def without_decoding(source: IterableDataset, columns: Sequence[str], split: str) -> IterableDataset:
    """A source whose images are given as files, so that filtering by other columns decodes nothing.

    Args:
        source: iterable data set.
        columns: names of the image column and of further columns that it must have.
        split: "training" or "test", for messages.

    Raises:
        ValueError: `source` is no iterable data set, a column is missing, or the first is no image column.
    """
    if isinstance(source, Mapping):
        raise ValueError(
            f"the {split} set has the splits {list(source)}: pass one of them, data[{next(iter(source), '')!r}]"
        )
    if not isinstance(source, IterableDataset):
        raise ValueError(
            f"the {split} set is a {type(source).__name__}, not an IterableDataset: use the stream for data sets with rows "
            "by number, or convert it with to_iterable_dataset()"
        )
    check_columns(source, columns, split)
    name = columns[0]
    if source.features is None:
        raise ValueError(
            f"the {split} set does not know the types of its columns: pass features= where it is made (from_generator, "
            f"map), as Features({{{name!r}: Image(), ...}})"
        )
    source = with_image_column(source, name)
    if not isinstance(source.features.get(name), Image):
        raise ValueError(f"column {name!r} of the {split} set is no Image: use cast_column({name!r}, Image())")
    return source.decode(False)


def content_id(cell: Mapping[str, Any] | None) -> int:
    """An id of 63 bits for an image file: a hash of its content or, if that is not in the data set, of its path."""
    cell = cell or {}
    content = cell.get("bytes") or str(cell.get("path")).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def _identity(batch: Any) -> Any:
    return batch


def _black() -> Any:
    return PILImage.new("RGB", (224, 224))
