"""Rows of a data set on their way into batches: reading, augmentation, padding, each process's share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from datasets import Dataset as RowsDataset
from datasets import Image
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_prompts.interfaces import IGNORE_INDEX


if TYPE_CHECKING:
    from cl_prompts.continual.streams.stream import Stream

Rows = NDArray[np.int64]
T = TypeVar("T")

# Marks images that only fill a batch up: the loss ignores the label, and no count takes the number.
PADDING_ID = -1


class LabelledImages(Dataset[dict[str, Any]]):
    """Rows of a stream as `pixel_values`, `labels`, `sample_ids` and, where known, `query`.

    A row is asked for by its number, or by -1 - number when it only fills a batch up. An image that cannot be read raises
    ValueError or, under `on_bad_image="skip"`, gives its place to the next readable one of `among` as padding.

    Args:
        stream: whose images.
        train: training or test images.
        queries: un-prompted features of all images [rows, D].
        augmented_by: (seed, epoch) of the augmentation; None: none.
        among: rows that may take an unreadable one's place, ascending; None: all.
        owner: whose they are, for the error when none of them can be read.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        train: bool,
        queries: Tensor | None = None,
        augmented_by: tuple[int, int] | None = None,
        among: Rows | None = None,
        owner: str = "",
    ) -> None:
        self.stream = stream
        self.split = "train" if train else "test"
        self.rows = stream.train if train else stream.test
        self.labels = stream.train_labels if train else stream.test_labels
        self.queries = queries
        self.augmented_by = augmented_by
        self.among = np.arange(len(self.labels)) if among is None else among
        self.owner = owner

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index if index >= 0 else -1 - index
        shown, image = self._readable(row)
        image = self.stream.cut(image, self.augmented_by, row)
        real = index >= 0 and shown == row
        item = {
            "pixel_values": self.stream.transform(image),
            "labels": int(self.labels[row]) if real else IGNORE_INDEX,
            "sample_ids": row if real else PADDING_ID,
            "unreadable": None if shown == row else row,
        }
        if self.queries is not None:
            item["query"] = self.queries[shown]
        return item

    def _readable(self, row: int) -> tuple[int, Any]:
        """A row and its image or, where bad images are skipped, the next row that has one."""
        for candidate in self._candidates(row):
            try:
                return candidate, read_image(partial(self._cell, candidate))
            except UnreadableImage as error:
                if self.stream.on_bad_image == "stop":
                    file = file_of(self.rows, candidate, self.stream.image_column)
                    raise bad_image(f"{self.split} row {candidate}{file}", error) from error
        owner = f" of {self.owner}" if self.owner else ""
        raise ValueError(f"none of the {len(self.among)} {self.split} images{owner} can be read: repair some")

    def _candidates(self, row: int) -> Iterator[int]:
        yield row
        behind = int(np.searchsorted(self.among, row, side="right"))
        for part in (self.among[behind:], self.among[:behind]):
            yield from map(int, part)

    def _cell(self, row: int) -> Any:
        return self.rows[row][self.stream.image_column]


class UnreadableImage(Exception):
    """An image that cannot be decoded."""


def read_image(read: Callable[[], Any]) -> Any:
    """An image, decoded.

    Raises:
        UnreadableImage: it cannot be.
    """
    try:
        image = read()
        if hasattr(image, "load"):
            image.load()  # PIL reads the header first and the rest on demand: a file cut short shows only now
    except Exception as error:  # decoders answer to broken files with nearly every kind of exception
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    if image is None:
        raise UnreadableImage("the cell is empty")
    return image


def bad_image(where: str, error: UnreadableImage) -> ValueError:
    """What to raise for an image that cannot be read."""
    return ValueError(f"the image of {where} cannot be read ({error}): repair it, or use on_bad_image='skip'")


def file_of(rows: Any, row: int, image_column: str) -> str:
    """ ", file ..." where a data set knows from which file an image comes, else nothing."""
    if not isinstance(rows, RowsDataset) or not isinstance(rows.features[image_column], Image):
        return ""
    cell = rows.cast_column(image_column, Image(decode=False))[row][image_column]
    return f", file {cell['path']}," if cell and cell["path"] else ""


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch; `sample_ids` stay a list on the host, where they are looked at."""
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "sample_ids": [item["sample_ids"] for item in items],
        "unreadable": [item["unreadable"] for item in items if item["unreadable"] is not None],
    }
    if "query" in items[0]:
        batch["query"] = torch.stack([item["query"] for item in items])
    return batch


def new_loader(images: Dataset[dict[str, Any]], workers: int, **options: Any) -> DataLoader[dict[str, Any]]:
    """A loader that draws nothing from the process's generator, so that a resumed run draws as the whole did."""
    pinned = torch.cuda.is_available()
    return DataLoader(images, num_workers=workers, pin_memory=pinned, generator=torch.Generator(), **options)


class Batches:
    """A pass over batches; can be taken again and again.

    Loader processes cannot tell the stream what they could not read, so the batches carry it to whoever goes through them.

    Args:
        loader: gives them, with `unreadable` beside the model's arguments.
        skipped: called with what was unreadable in a batch.
    """

    def __init__(self, loader: DataLoader[dict[str, Any]], skipped: Callable[[list[int]], None]) -> None:
        self.loader, self._skipped = loader, skipped

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            self._skipped(batch.pop("unreadable"))
            yield batch


def shares(rows: Sequence[int] | Rows, batch_size: int) -> Iterator[list[int]]:
    """This process's share of each global batch of `batch_size` rows; all processes get shares of equal length."""
    rank, processes = rank_and_processes()
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be a positive number of images")
    if batch_size % processes:
        raise ValueError(f"a global batch of {batch_size} images does not divide by {processes} processes")
    for start in range(0, len(rows), batch_size):
        batch = [int(row) for row in rows[start : start + batch_size]]
        yield own_share(batch, rank, processes, lambda row: -1 - row)


def own_share(batch: list[T], rank: int, processes: int, as_padding: Callable[[T], T]) -> list[T]:
    """One process's share of a batch that is first filled up until it divides."""
    missing = -len(batch) % processes
    filled = batch + [as_padding(batch[i % len(batch)]) for i in range(missing)]
    size = len(filled) // processes
    return filled[rank * size : (rank + 1) * size]


def rank_and_processes() -> tuple[int, int]:
    """This process's number and how many train together."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
