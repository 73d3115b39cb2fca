"""The interface of a stream of tasks, and what all streams share.

`IndexedStream` (`indexed.py`) reads data sets that give rows by number, `IterableStream` (`iterable.py`) data sets that can
only be read in order. The scenarios are in `scenarios.py`, `gaussian.py`, `joint.py` and `iterable_scenarios.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.image_column import ImageColumn
from cl_prompts.continual.streams.loading import Batches
from cl_prompts.continual.streams.pixels import KeptPixels
from cl_prompts.continual.streams.transforms import as_pixels, as_transform
from cl_prompts.runtime.distributed import gather_over_processes
from cl_prompts.runtime.images import MAX_PIXELS


ON_BAD_IMAGE = ("stop", "skip")


@dataclass(frozen=True)
class Task:
    """One task of a stream.

    Args:
        number: position in the stream, from 0.
        classes: class ids, as in the labels.
        name: name of its domain or data set; "" if it has none.
        revisit: whether its classes were seen in an earlier task.
    """

    number: int
    classes: list[int]
    name: str = ""
    revisit: bool = False


class Stream(ABC):
    """Tasks and their images, one after another. The learner sees the training images of one task at a time.

    Args:
        tasks: the tasks, at least one.
        transform: image -> float tensor [3, H, W], or the image processor of the base model. It gets PIL images in mode
            RGB, made by the rule of `cl_prompts.runtime.images`. Arrays and tensors of the data set it gets as they are.
        names: class names by id, where known.
        image_column: name of the column of images.
        augmentation: augmentation of training images; None: none.
        on_bad_image: what happens if an image cannot be read: "stop" raises an error that names it, "skip" leaves it out.

    Attributes:
        scenario: name of the scenario.
        task_free: whether the learner is not told where tasks begin and end.
        max_pixels: largest number of pixels of an image file, checked before it is decoded; half of it for WebP and
            progressive CMYK JPEG. A larger image cannot be read. May be set; default 50 million.
        kept_pixels: by split, the images that are decoded and resized only once; see `IndexedStream.keep_pixels`.
        skipped: under "train" and "test", the ids of the images that this process could not read, ascending. After a
            resume they include those of all processes before it.

    Raises:
        TypeError: `transform` is no function.
        ValueError: there are no tasks, or `on_bad_image` is unknown.
    """

    scenario: ClassVar[str]
    task_free: bool = False
    tasks: Sequence[Task]
    max_pixels: int = MAX_PIXELS

    def __init__(
        self,
        tasks: Sequence[Task],
        transform: Callable[[Any], Tensor],
        *,
        names: Mapping[int, str],
        image_column: str,
        augmentation: CropAndFlip | None,
        on_bad_image: str,
    ) -> None:
        if on_bad_image not in ON_BAD_IMAGE:
            raise ValueError(f"on_bad_image={on_bad_image!r}: choose one of {list(ON_BAD_IMAGE)}")
        if not tasks:
            raise ValueError("a stream needs at least one task")
        self.tasks = list(tasks)
        self.transform = as_transform(transform)
        self.names = dict(names)
        self.image_column = image_column
        self.augmentation, self.on_bad_image = augmentation, on_bad_image
        self.skipped: dict[str, list[int]] = {"train": [], "test": []}
        self.kept_pixels: dict[str, KeptPixels] = {}
        self._columns: dict[str, ImageColumn] = {}

    # ---- what each kind of stream implements -------------------------------------------------------------------------

    @abstractmethod
    def train_batches(
        self, task: Task, batch_size: int, *, seed: int, epoch: int, num_workers: int = 0, start: int = 0
    ) -> Batches:
        """Training images of a task, in an order that depends on (seed, task, epoch) only.

        With several processes, each process gets its part of every global batch. All parts have the same length: the last
        batch is padded, and padding is not counted.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes.
            seed: seed of the order and of the augmentation.
            epoch: epoch of the task, from 0; each has its own order and augmentation.
            num_workers: loader processes, as in `torch.utils.data.DataLoader`.
            start: number of steps at the beginning of the epoch to leave out; their images are not read.
        """

    @abstractmethod
    def steps_per_epoch(self, task: Task, batch_size: int) -> int:
        """Number of batches of `train_batches` with `start=0`.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes.
        """

    @abstractmethod
    def test_batches(self, task: Task, batch_size: int, *, num_workers: int = 0) -> Batches:
        """Test images of a task in order; each process gets its part of every batch.

        Args:
            task: a task of this stream.
            batch_size: images of a batch over all processes.
            num_workers: loader processes, as in `torch.utils.data.DataLoader`.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Sha256 of what decides which image comes when; equal fingerprints mean the same stream."""

    # ---- shared ------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def classes(self) -> list[int]:
        """Class ids of all tasks, in order of first appearance."""
        return list(dict.fromkeys(c for task in self.tasks for c in task.classes))

    def class_names(self, classes: Sequence[int]) -> dict[int, str]:
        """Names of the class ids `classes`; ids without a known name are left out."""
        return {int(c): self.names[int(c)] for c in classes if int(c) in self.names}

    def column_of(self, split: str, data: Any) -> ImageColumn:
        """The image column of the `data` of a `split`, made once: `datasets` takes 0.05 s to make one."""
        known = self._columns.get(split)
        if known is None or known.source is not data or known.name != self.image_column:
            known = self._columns[split] = ImageColumn(data, self.image_column)
        return known

    def pixels(self, image: Any) -> Tensor:
        """The tensor [3, H, W] that the transform makes of an `image`.

        Raises:
            TypeError: the transform returns no tensor or array, or integers.
            ValueError: the transform does not return one image.
        """
        return as_pixels(self.transform(image))

    def transforms_plainly(self, augmented_by: tuple[int, int] | None) -> bool:
        """Whether `augment` with this `augmented_by` leaves images as they are."""
        return augmented_by is None or self.augmentation is None or self.augmentation.on_device

    def augment(self, image: Any, augmented_by: tuple[int, int] | None, number: int) -> Any:
        """An `image` augmented in the loader, before the transform.

        Returned unchanged without an augmentation, and if the augmentation runs on the device.

        Args:
            image: PIL image or tensor.
            augmented_by: (seed, epoch) of the augmentation; None: no augmentation.
            number: id of the image.
        """
        if self.transforms_plainly(augmented_by) or self.augmentation is None or augmented_by is None:
            return image
        return self.augmentation.apply(image, *augmented_by, number)

    def augment_on_device(self, batch: dict[str, Any], augmented_by: tuple[int, int] | None) -> dict[str, Any]:
        """A `batch` on the model's device, augmented there if the augmentation runs on the device.

        Args:
            batch: a batch of this stream.
            augmented_by: (seed, epoch) of the augmentation; None: no augmentation.
        """
        if augmented_by is None or self.augmentation is None or not self.augmentation.on_device:
            return batch
        images = self.augmentation.apply_batch(batch["pixel_values"], *augmented_by, batch["sample_ids"])
        return batch | {"pixel_values": images}

    def count_skipped(self) -> int:
        """Number of different images that could not be read, over all processes. Every process must call it."""
        found: set[tuple[str, int]] = set()
        device = "cuda" if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl" else "cpu"
        for split, numbers in self.skipped.items():
            for part in gather_over_processes(torch.tensor(numbers, dtype=torch.int64, device=device)):
                found |= {(split, number) for number in part.tolist()}
        return len(found)

    def _record_skipped(self, split: str, numbers: list[int]) -> None:
        if numbers:
            self.skipped[split] = sorted({*self.skipped[split], *numbers})
