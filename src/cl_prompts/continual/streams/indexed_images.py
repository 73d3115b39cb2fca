"""Images of a data set with rows by number, as items of a torch data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from cl_prompts.continual.streams.data_sets import is_own_error
from cl_prompts.continual.streams.loading import PADDING_ID, Rows, padding_index, unreadable_error
from cl_prompts.continual.streams.stream import Stream
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.images import UnreadableImage


class IndexedImages(Dataset[dict[str, Any]]):
    """Rows of a data set as `pixel_values`, `labels`, `sample_ids` (row numbers), `unreadable` and, if given, `query`.

    An index is a row number, or `padding_index(row)` for padding. Under `on_bad_image="skip"` an image that cannot be read
    is replaced by the next readable one of `replacements`, as padding.

    Args:
        stream: gives transform, augmentation and `on_bad_image`.
        split: "train" or "test".
        data: data set with the stream's image column.
        labels: class id of each row [rows].
        queries: un-prompted features of all images [rows, D]; None: items have no `query`.
        augmented_by: (seed, epoch) of the augmentation; None: no augmentation.
        replacements: row numbers that may replace an unreadable image, ascending; None: all rows.
        owner: name of the task of these rows, for the error if none of them can be read.

    Raises:
        ValueError: on access, the image cannot be read or, under `on_bad_image="skip"`, no replacement can. Errors of a
            transform that the data set itself has are raised as they are.
    """

    def __init__(
        self,
        stream: Stream,
        split: str,
        data: Any,
        labels: Rows,
        *,
        queries: Tensor | None = None,
        augmented_by: tuple[int, int] | None = None,
        replacements: Rows | None = None,
        owner: str = "",
    ) -> None:
        self.stream, self.split = stream, split
        self.column, self.labels = stream.column_of(split, data), labels
        self.queries, self.augmented_by = queries, augmented_by
        self.replacements = np.arange(len(labels)) if replacements is None else replacements
        self.owner = owner

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = index if index >= 0 else padding_index(index)
        source, pixels = self._pixels(row)
        real = index >= 0 and source == row
        item = {
            "pixel_values": pixels,
            "labels": int(self.labels[row]) if real else IGNORE_INDEX,
            "sample_ids": row if real else PADDING_ID,
            "unreadable": None if source == row else row,
        }
        if self.queries is not None:
            item["query"] = self.queries[source]
        return item

    def _pixels(self, row: int) -> tuple[int, Tensor]:
        """The row that is read for `row`, and the tensor [3, H, W] of its image."""
        stream = self.stream
        kept = stream.kept_pixels.get(self.split) if stream.transforms_plainly(self.augmented_by) else None
        pixels = None if kept is None else kept.read(row)
        if pixels is not None:
            return row, pixels
        source, image = self._read(row)
        pixels = None if kept is None else kept.keep(source, image, stream.pixels)
        return source, stream.pixels(stream.augment(image, self.augmented_by, row)) if pixels is None else pixels

    def _read(self, row: int) -> tuple[int, Any]:
        """The row that is read for `row`, and its image. The two rows differ if the image of `row` is skipped."""
        for candidate in self._candidates(row):
            try:
                return candidate, self.column.read(candidate, self.stream.max_pixels)
            except UnreadableImage as error:
                cause = error.__cause__
                if cause is not None and is_own_error(self.column.data, candidate, self.stream.image_column, cause):
                    cause.add_note(f"raised by the data set's own code, in {self.split} row {candidate}")
                    raise cause from None
                if self.stream.on_bad_image == "stop":
                    file = self.column.file_note(candidate)
                    raise unreadable_error(f"{self.split} row {candidate}{file}", error) from error
        owner = f" of {self.owner}" if self.owner else ""
        raise ValueError(f"none of the {len(self.replacements)} {self.split} images{owner} can be read: repair some")

    def _candidates(self, row: int) -> Iterator[int]:
        """`row`, the replacements after it, then those before it."""
        yield row
        place = int(np.searchsorted(self.replacements, row, side="right"))
        for part in (self.replacements[place:], self.replacements[:place]):
            yield from map(int, part)
