"""New classes, or new domains of the same classes, from data sets that can only be read in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import Dataset, IterableDataset
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import labels_of, names_of
from cl_prompts.continual.streams.iterable import IterableStream, NoRows, undecoded
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.scenarios import by_domain, checked_tasks
from cl_prompts.continual.streams.stream import Task


class IterableClassIncrementalStream(IterableStream):
    """`ClassIncrementalStream` over an iterable training set.

    Args:
        train: iterable data set with an image and a label column.
        test: the same, or a data set with rows by number.
        tasks: class ids of each task, in order. They cannot be counted here, so they must be given.
        transform: image -> float tensor [3, H, W], the base's image processor.
        buffer_size: images among which each training image is drawn at random; 0: the source's order.
        train_images: number of training images of each task, where known; without them there are no step counts.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a class comes twice, a task has none, or columns are missing. While it is read: a task without images.
    """

    scenario = "class-incremental, in order"

    def __init__(
        self,
        train: IterableDataset,
        test: IterableDataset | Dataset,
        tasks: Sequence[Sequence[int]],
        transform: Callable[[Any], Tensor],
        *,
        buffer_size: int = 1000,
        train_images: Sequence[int] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        classes_of, columns = checked_tasks(tasks), [image_column, label_column]
        in_order = isinstance(test, IterableDataset)
        test_labels = cast("Rows", NoRows("test")) if in_order else labels_of(test, label_column, "test")
        made = []
        for number, classes in enumerate(classes_of):
            test_rows = cast("Rows", NoRows("test")) if in_order else np.flatnonzero(np.isin(test_labels, classes))
            if not in_order and (absent := sorted(set(classes) - set(test_labels[test_rows].tolist()))):
                raise ValueError(f"task {number}: classes {absent} have no test images")
            made.append(Task(number, classes, cast("Rows", NoRows("training")), test_rows))
        super().__init__(
            [_of_classes(train, columns, classes, "training") for classes in classes_of],
            [_of_classes(test, columns, classes, "test") for classes in classes_of] if in_order else None,
            label_column=label_column,
            buffer_size=buffer_size,
            train_images=train_images,
            train=train,
            test=test,
            tasks=made,
            transform=transform,
            train_labels=cast("Rows", NoRows("training")),
            test_labels=test_labels,
            names=names_of(train, label_column),
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


class IterableDomainIncrementalStream(IterableStream):
    """`DomainIncrementalStream` over iterable training sets.

    Args:
        train: one iterable data set with image, label and domain columns, or one for each domain by its name.
        test: the same, or data sets with rows by number.
        classes: class ids, the same in all domains. They cannot be counted here, so they must be given.
        transform: image -> float tensor [3, H, W], the base's image processor.
        domains: names or values of the domains in order; None: those of the data sets given by name.
        domain_column: its name, where there is one.
        buffer_size: images among which each training image is drawn at random; 0: the source's order.
        train_images: number of training images of each task, where known; without them there are no step counts.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: domains are not told, come twice or have no test images; columns are missing. While it is read: a domain
            without images, or a label outside `classes`.
    """

    scenario = "domain-incremental, in order"

    def __init__(
        self,
        train: IterableDataset | Mapping[str, IterableDataset],
        test: Any,
        classes: Sequence[int],
        transform: Callable[[Any], Tensor],
        *,
        domains: Sequence[Any] | None = None,
        domain_column: str = "domain",
        buffer_size: int = 1000,
        train_images: Sequence[int] | None = None,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        if domains is None and not isinstance(train, Mapping):
            raise ValueError("the domains of an IterableDataset cannot be listed before it is read: give domains")
        order = [str(name) for name in (train if domains is None else domains)]
        if not order or len(set(order)) < len(order):
            raise ValueError(f"domains={order}: name each once, and at least one")
        (classes,) = checked_tasks([classes])
        columns = [image_column, label_column]
        parts = list(test.values()) if isinstance(test, Mapping) else [test]
        in_order = isinstance(parts[0], IterableDataset)
        first = next(iter(train.values())) if isinstance(train, Mapping) else train
        rows, labels, found = test, cast("Rows", NoRows("test")), None
        if not in_order:
            rows, labels, found = by_domain(test, image_column, label_column, domain_column, "test")
        made = []
        for number, name in enumerate(order):
            test_rows = cast("Rows", NoRows("test")) if found is None else np.flatnonzero(found == name)
            if found is not None and not len(test_rows):
                raise ValueError(f"domain {name!r} has no test images; there are domains {np.unique(found).tolist()}")
            if found is not None and (strange := sorted(set(labels[test_rows].tolist()) - set(classes))):
                raise ValueError(f"domain {name!r}: test images are of classes {strange}, which the stream has not")
            made.append(Task(number, classes, cast("Rows", NoRows("training")), test_rows, name, revisit=number > 0))
        super().__init__(
            [_of_domain(train, columns, domain_column, name, "training") for name in order],
            [_of_domain(test, columns, domain_column, name, "test") for name in order] if in_order else None,
            label_column=label_column,
            buffer_size=buffer_size,
            train_images=train_images,
            train=first,
            test=parts[0] if in_order else rows,
            tasks=made,
            transform=transform,
            train_labels=cast("Rows", NoRows("training")),
            test_labels=labels,
            names=names_of(first, label_column),
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


def _of_classes(source: IterableDataset, columns: Sequence[str], classes: Sequence[int], split: str) -> IterableDataset:
    """The rows of a source with labels (the last of the columns) among these."""
    rows = undecoded(source, columns, split)
    return rows.filter(_is_one_of, input_columns=[columns[-1]], fn_kwargs={"values": frozenset(classes)})


def _of_domain(source: Any, columns: Sequence[str], domain_column: str, name: str, split: str) -> IterableDataset:
    """The rows of a domain, from the source of its name or by the column."""
    if isinstance(source, Mapping):
        if name not in source:
            raise ValueError(f"there is no {split} set of domain {name!r}, only of {list(source)}")
        return undecoded(source[name], columns, split)
    rows = undecoded(source, [*columns, domain_column], split)
    by_name = {known: value for value, known in names_of(source, domain_column).items()}
    return rows.filter(_reads, input_columns=[domain_column], fn_kwargs={"name": str(by_name.get(name, name))})


def _is_one_of(value: Any, values: frozenset[Any]) -> bool:
    return value in values


def _reads(value: Any, name: str) -> bool:
    return str(value) == name
