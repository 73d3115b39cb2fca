"""From rows to batches: unreadable images, collating, data loaders, and the part of a batch that belongs to a process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from cl_prompts.runtime.cpu import cores
from cl_prompts.runtime.images import UnreadableImage


Rows = NDArray[np.int64]
T = TypeVar("T")

# `sample_ids` of padding images. Their label is IGNORE_INDEX, so that neither losses nor counts include them.
PADDING_ID = -1


# ---- unreadable images ---------------------------------------------------------------------------------------------------


def unreadable_error(image: str, error: UnreadableImage) -> ValueError:
    """The exception to raise for an unreadable image, described by `image`."""
    return ValueError(f"the image of {image} cannot be read ({error}): repair it, or use on_bad_image='skip'")


# ---- batches -------------------------------------------------------------------------------------------------------------


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items. `sample_ids` and `unreadable` are lists, so that they stay on the host.

    Raises:
        ValueError: the images have different sizes.
    """
    shapes = sorted({tuple(item["pixel_values"].shape) for item in items})
    if len(shapes) > 1:
        raise ValueError(f"the transform returned images of sizes {shapes}: let it resize all to one size")
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "sample_ids": [item["sample_ids"] for item in items],
        "unreadable": [item["unreadable"] for item in items if item["unreadable"] is not None],
    }
    if "query" in items[0]:
        batch["query"] = torch.stack([item["query"] for item in items])
    return batch


def build_loader(images: Dataset[dict[str, Any]], num_workers: int, **options: Any) -> DataLoader[dict[str, Any]]:
    """A data loader with a generator of its own.

    It does not draw from torch's global generator, so that a resumed run draws the same numbers as a whole one.
    """
    pinned = torch.cuda.is_available()
    return DataLoader(images, num_workers=num_workers, pin_memory=pinned, generator=torch.Generator(), **options)


def read_ahead(batches: Iterable[T]) -> Iterator[T]:
    """The same batches. A thread reads the next one while one is used."""
    source = iter(batches)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, source, None)
            yield batch


def has_a_core_to_read() -> bool:
    """Whether a thread that reads images has a core: torch computes on a GPU, or with fewer threads than cores."""
    return torch.cuda.is_available() or torch.get_num_threads() < cores()


class Batches:
    """Batches of a data loader; can be iterated several times.

    Loader processes cannot change the stream in this process, so that each batch carries the ids of its unreadable images.

    Args:
        loader: gives batches that have `unreadable` besides the model's arguments.
        on_unreadable: called with `unreadable` of each batch.
        ahead: read in a thread, one batch ahead.
    """

    def __init__(
        self, loader: DataLoader[dict[str, Any]], on_unreadable: Callable[[list[int]], None], ahead: bool = False
    ) -> None:
        self.loader, self._on_unreadable, self._ahead = loader, on_unreadable, ahead

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in read_ahead(self.loader) if self._ahead else self.loader:
            self._on_unreadable(batch.pop("unreadable"))
            yield batch


# ---- processes -----------------------------------------------------------------------------------------------------------


def padding_index(row: int) -> int:
    """The index that stands for a row used as padding. It is negative and its own inverse."""
    return -1 - row


def process_shards(rows: Sequence[int] | Rows, batch_size: int) -> Iterator[list[int]]:
    """This process's shard of each global batch of rows; see `process_shard`.

    Args:
        rows: row numbers.
        batch_size: rows of a batch over all processes.

    Raises:
        ValueError: `batch_size` is not positive, or does not divide by the number of processes.
    """
    rank, processes = rank_and_processes()
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be a positive number of images")
    if batch_size % processes:
        raise ValueError(f"a global batch of {batch_size} images does not divide by {processes} processes")
    for start in range(0, len(rows), batch_size):
        batch = [int(row) for row in rows[start : start + batch_size]]
        yield process_shard(batch, rank, processes, padding_index)


def process_shard(batch: list[T], rank: int, processes: int, as_padding: Callable[[T], T]) -> list[T]:
    """The shard of a global batch that belongs to process `rank`. All shards have the same length.

    A batch that does not divide by the number of processes is filled with its first items, converted by `as_padding`.
    """
    missing = -len(batch) % processes
    filled = batch + [as_padding(batch[i % len(batch)]) for i in range(missing)]
    size = len(filled) // processes
    return filled[rank * size : (rank + 1) * size]


def rank_and_processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
