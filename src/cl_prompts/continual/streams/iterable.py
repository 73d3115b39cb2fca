"""Data sets that can only be read in order (`datasets.IterableDataset`, `load_dataset(streaming=True)`).

Every process and every loader process goes through the whole source and decodes only its own share, so that batches are
those of one process without loader processes, image by image. (Sources that are cut by shards among processes would give
other batches, and processes of unequal length.) Each epoch of each task is another pass over the source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from datasets import Image, IterableDataset
from torch import Tensor
from torch.utils.data import get_worker_info

from cl_prompts.continual.streams.columns import check_columns
from cl_prompts.continual.streams.loading import (
    PADDING_ID,
    Batches,
    Rows,
    UnreadableImage,
    bad_image,
    collate,
    new_loader,
    own_share,
    rank_and_processes,
    read_image,
)
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.interfaces import IGNORE_INDEX


class NoRows:
    """Stands where row numbers and labels of a data set would be that has none, and says so to whoever asks for them."""

    def __init__(self, split: str) -> None:
        self.split = split

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            f"the {self.split} set is an IterableDataset, which has no rows by number: rehearsal, held-out images, cached "
            "queries, class statistics and step counts need them; load it without streaming=True"
        )

    __len__ = __iter__ = __getitem__ = __array__ = _refuse


class IterableStream(Stream):
    """What streams over iterable sources share.

    An image's number (`sample_ids`) is a hash of its file's content: the same in every epoch.

    Args:
        train_sources: training images of each task, not decoded (`undecoded`).
        test_sources: test images of each task; None: they are rows of `test`.
        label_column: its name.
        buffer_size: images among which each training image is drawn at random; 0: the source's order.
        train_images: number of training images of each task, where known; without them there are no step counts.
        others: see `Stream`.

    Raises:
        ValueError: `train_images` are not one positive number for each task.
    """

    random_access = False

    def __init__(
        self,
        train_sources: Sequence[IterableDataset],
        test_sources: Sequence[IterableDataset] | None,
        *,
        label_column: str,
        buffer_size: int,
        train_images: Sequence[int] | None,
        tasks: Sequence[Task],
        **others: Any,
    ) -> None:
        super().__init__(tasks=tasks, **others)
        if train_images is not None and (len(train_images) != len(tasks) or min(train_images) < 1):
            raise ValueError(f"train_images={list(train_images)}: give a positive number for each of {len(tasks)} tasks")
        self.train_sources, self.test_sources = list(train_sources), None if test_sources is None else list(test_sources)
        self.label_column, self.buffer_size = label_column, buffer_size
        self.train_images = None if train_images is None else [int(n) for n in train_images]

    def fingerprint(self) -> str:
        """Sha256 over all that is known before the sources are read: scenario, tasks, augmentation, seeds."""
        known = [[task.number, task.name, task.revisit, task.classes] for task in self.tasks]
        told = [self.scenario, known, repr(self.augmentation), self.buffer_size, self.train_images, self.label_column]
        return hashlib.sha256(repr(told).encode()).hexdigest()

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
        """As `Stream.train_batches`; shuffled by a buffer, from (seed, task, epoch) alone.

        Raises:
            ValueError: `queries`, `rows` or `memory_rows` are given, which need rows by number.
        """
        for given in (queries, rows, memory_rows):
            if given is not None and (callable(given) or len(given)):
                len(NoRows("training"))
        source = self.train_sources[task.number]
        if self.buffer_size:
            random = np.random.default_rng([seed, task.number, epoch])
            # One shard at a time: after a pass over interleaved shards datasets 5.2 sleeps for five seconds.
            source = source.shuffle(generator=random, buffer_size=self.buffer_size, max_buffer_input_shards=1)
        expected = self.train_images[task.number] if self.train_images is not None else None
        augmented_by = (seed, epoch) if self.augments else None
        images = StreamedImages(self, source, "train", batch_size, start, expected, augmented_by)
        return self._streamed(images, workers)

    def steps_per_epoch(self, task: Task, batch_size: int, rows: Sequence[int] | Rows | None = None) -> int:
        """How many batches an epoch has, from `train_images`."""
        if self.train_images is None or rows is not None:
            raise ValueError(
                "the images of an IterableDataset cannot be counted before they are read: give train_images, the number of "
                "training images of each task"
            )
        return -(-self.train_images[task.number] // batch_size)

    def test_batches(self, task: Task, batch_size: int, *, queries: Tensor | None = None, workers: int = 0) -> Batches:
        """A task's test images in order; each process gets its share of every batch."""
        if self.test_sources is None:
            return super().test_batches(task, batch_size, queries=queries, workers=workers)
        if queries is not None:
            len(NoRows("test"))
        images = StreamedImages(self, self.test_sources[task.number], "test", batch_size, 0, None, None)
        return self._streamed(images, workers)

    def _streamed(self, images: StreamedImages, workers: int) -> Batches:
        loader = new_loader(images, workers, batch_size=None, collate_fn=_as_it_is)
        return Batches(loader, self._noter(images.split))


class StreamedImages(torch.utils.data.IterableDataset[dict[str, Any]]):
    """One pass over a source as this process's share of each global batch.

    Args:
        stream: for transform, classes and what to do with bad images.
        source: images of one task in the order of the pass.
        split: "train" or "test".
        batch_size: images of a global batch.
        start: batches to leave out; none of their images is decoded.
        expected: number of images of the whole pass, if known.
        augmented_by: (seed, epoch) of the augmentation; None: none.

    Raises:
        ValueError: while it is read, there are no images or not as many as expected, none can be read, or a label is
            outside the classes.
    """

    def __init__(
        self,
        stream: IterableStream,
        source: IterableDataset,
        split: str,
        batch_size: int,
        start: int,
        expected: int | None,
        augmented_by: tuple[int, int] | None,
    ) -> None:
        self.rank, self.processes = rank_and_processes()
        if batch_size < 1 or batch_size % self.processes:
            raise ValueError(f"a global batch of {batch_size} images does not divide by {self.processes} processes")
        self.stream, self.split, self.batch_size, self.start = stream, split, batch_size, start
        self.source = source
        self.image = Image(mode=source.features[stream.image_column].mode)
        self.expected, self.augmented_by = expected, augmented_by
        self.classes = set(stream.classes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        readable = False
        for step, batch in enumerate(self._global_batches()):
            if step >= self.start and (step - self.start) % workers == worker:
                pairs = [(example, True) for example in batch]
                share = own_share(pairs, self.rank, self.processes, lambda pair: (pair[0], False))
                items = [self._item(example, real) for example, real in share]
                readable = readable or any(item["unreadable"] is None for item in items)
                yield self._batch(items)
        if not readable:  # nothing of this share: perhaps of another's
            self._require_readable()

    def _require_readable(self) -> None:
        """Raise if no image of the source can be read."""
        unreadable = 0
        for batch in self._global_batches():
            for example in batch:
                if self._item(example, True)["unreadable"] is None:
                    return
                unreadable += 1
        raise ValueError(f"none of the {unreadable} {self.split} images of this task can be read: repair some")

    def _global_batches(self) -> Iterator[list[dict[str, Any]]]:
        count, batch = 0, []
        # iter(), unlike a plain loop, gives every loader process the whole source and not its own shards of it.
        for columns in self.source.iter(batch_size=32):
            for values in zip(*columns.values(), strict=True):
                batch.append(dict(zip(columns, values, strict=True)))
                count += 1
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
        if batch:
            yield batch
        if count != (self.expected if self.expected is not None else count) or not count:
            wanted = "" if self.expected is None else f", not the {self.expected} of train_images"
            raise ValueError(f"the pass over the {self.split} set gave {count} images{wanted}")

    def _batch(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        shown = [item["pixel_values"] for item in items if item["pixel_values"] is not None]
        if len(shown) < len(items):
            stand_in = shown[0] if shown else self.stream.transform(_black())
            items = [item if item["pixel_values"] is not None else item | {"pixel_values": stand_in} for item in items]
        return collate(items)

    def _item(self, example: dict[str, Any], real: bool) -> dict[str, Any]:
        cell, label = example[self.stream.image_column], example[self.stream.label_column]
        if label not in self.classes:
            raise ValueError(
                f"a {self.split} image has label {label!r}, and the stream's classes are {self.stream.classes}"
            )
        number = content_number(cell)
        item: dict[str, Any] = {
            "pixel_values": None,
            "labels": IGNORE_INDEX,
            "sample_ids": PADDING_ID,
            "unreadable": number,
        }
        try:
            image = read_image(partial(self.image.decode_example, cell))
        except UnreadableImage as error:
            if self.stream.on_bad_image == "stop":
                raise bad_image(f"{self.split} file {(cell or {}).get('path')}, label {label},", error) from error
            return item | {"unreadable": number}
        image = self.stream.cut(image, self.augmented_by, number)
        item |= {"pixel_values": self.stream.transform(image), "unreadable": None}
        return item | {"labels": label, "sample_ids": number} if real else item


def undecoded(source: IterableDataset, columns: Sequence[str], split: str) -> IterableDataset:
    """A source whose images stay files, so that looking at its other columns decodes nothing.

    Args:
        source: iterable data set.
        columns: names of the image column and of others that it must have.
        split: "training" or "test", for messages.

    Raises:
        ValueError: it is none, a column is missing, or the first is no image column.
    """
    if not isinstance(source, IterableDataset):
        raise ValueError(
            f"the {split} set is a {type(source).__name__}, which need not be streamed: use the stream for data sets that "
            "are loaded whole, or its to_iterable_dataset()"
        )
    check_columns(source, columns, split)
    name = columns[0]
    if not isinstance((source.features or {}).get(name), Image):
        raise ValueError(f"column {name!r} of the {split} set is no Image: use cast_column({name!r}, Image())")
    return source.decode(False)


def content_number(cell: Mapping[str, Any] | None) -> int:
    """A number of 63 bits for an image file, from its content or, where that is not at hand, its path."""
    cell = cell or {}
    content = cell.get("bytes") or str(cell.get("path")).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1


def _as_it_is(batch: Any) -> Any:
    return batch


def _black() -> Any:
    from PIL import Image as PILImage  # where images are read, Pillow is there

    return PILImage.new("RGB", (224, 224))
