"""New classes, or new domains of the same classes, from data sets that can only be read in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, Value
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import read_class_names
from cl_prompts.continual.streams.data_sets import as_rows
from cl_prompts.continual.streams.iterable import IndexedTestSet, IterableStream, without_decoding
from cl_prompts.continual.streams.labels import (
    as_class,
    check_class_id,
    label_ids,
    names_in_tasks,
    names_of_ids,
    read_labels,
    validate_tasks,
)
from cl_prompts.continual.streams.scenarios import parts_of, read_domains, rows_by_domain, rows_of_classes
from cl_prompts.continual.streams.stream import Task


class IterableClassIncrementalStream(IterableStream):
    """`ClassIncrementalStream` over an iterable training set.

    Args:
        train: iterable data set with an image and a label column.
        test: iterable data set, or data set with rows by number.
        tasks: class ids or class names of each task, in order. They must be given, because an iterable data set cannot be
            counted. For labels that are strings, give the names.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        buffer_size: size of the shuffle buffer from which training images are drawn; 0: the order of the source.
        train_images: number of training images of each task, if known; without it the number of steps is unknown.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a task has no classes, a class is given twice, or a column is missing. During iteration: a task has no
            images.
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
        columns = (image_column, label_column)
        names_of_ids([train, test], label_column)  # refuses sets that name an id differently
        names = names_in_tasks(tasks, train, label_column)
        classes_of_task = validate_tasks(tasks, names)
        labels_of_task = [label_ids(classes, names) for classes in classes_of_task]
        train_sources = [_filter_classes(train, columns, labels, "training") for labels in labels_of_task]
        test_set: Sequence[IterableDataset] | IndexedTestSet
        if isinstance(test, IterableDataset):
            test_set = [_filter_classes(test, columns, labels, "test") for labels in labels_of_task]
        else:
            test = as_rows(test, image_column, label_column, "test")
            labels = read_labels(test, label_column, "test", names)
            rows = [rows_of_classes(labels, classes, "test", n) for n, classes in enumerate(classes_of_task)]
            test_set = IndexedTestSet(test, labels, rows)
        super().__init__(
            train_sources,
            test_set,
            [Task(number, classes) for number, classes in enumerate(classes_of_task)],
            transform,
            names=names,
            image_column=image_column,
            label_column=label_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
            buffer_size=buffer_size,
            train_images=train_images,
        )


class IterableDomainIncrementalStream(IterableStream):
    """`DomainIncrementalStream` over iterable training sets.

    Args:
        train: one iterable data set with image, label and domain columns, or one per domain by its name.
        test: iterable data sets of the same kind, or data sets with rows by number.
        classes: class ids or class names, the same in all domains. They must be given, because an iterable data set cannot
            be counted.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        domains: names or values of the domains in order; None: the names of the data sets, if they are given by name.
        domain_column: name of the column of domains, if there is one.
        buffer_size: size of the shuffle buffer from which training images are drawn; 0: the order of the source.
        train_images: number of training images of each task, if known; without it the number of steps is unknown.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: domains are not given, given twice or without test images, or a column is missing. During iteration: a
            domain has no images, or a label is not in `classes`.
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
            raise ValueError(f"domains={order}: name each domain once, and at least one")
        first = next(iter(train.values())) if isinstance(train, Mapping) else train
        # Refuses sets that name an id differently.
        names_of_ids([part for each in (train, test) for part in parts_of(each)], label_column)
        names = names_in_tasks([classes], first, label_column)
        (classes,) = validate_tasks([classes], names)
        columns = (image_column, label_column)
        train_sources = [_filter_domain(train, columns, domain_column, name, "training") for name in order]
        first_test = next(iter(test.values())) if isinstance(test, Mapping) else test
        test_set: Sequence[IterableDataset] | IndexedTestSet
        if isinstance(first_test, IterableDataset):
            test_set = [_filter_domain(test, columns, domain_column, name, "test") for name in order]
        else:
            test = rows_by_domain(test, image_column, label_column, "test")
            data, labels, found = read_domains(test, (*columns, domain_column), names, "test")
            test_set = IndexedTestSet(data, labels, [_test_rows(labels, found, name, classes) for name in order])
        super().__init__(
            train_sources,
            test_set,
            [Task(number, classes, name, revisit=number > 0) for number, name in enumerate(order)],
            transform,
            names=names,
            image_column=image_column,
            label_column=label_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
            buffer_size=buffer_size,
            train_images=train_images,
        )


def _test_rows(labels: Any, domain_of_row: Any, name: str, classes: Sequence[int]) -> Any:
    """Row numbers of the test images of a domain."""
    rows = np.flatnonzero(domain_of_row == name)
    if not len(rows):
        raise ValueError(
            f"domain {name!r} has no test images; the test set has domains {np.unique(domain_of_row).tolist()}"
        )
    if unknown := sorted(set(labels[rows].tolist()) - set(classes)):
        raise ValueError(f"domain {name!r}: test images are of classes {unknown}, which the stream does not have")
    return rows


def _filter_classes(source: IterableDataset, columns: Sequence[str], labels: Iterable[Any], split: str) -> IterableDataset:
    """The rows of a source whose label, the last of `columns`, is among `labels`."""
    rows, label_column = without_decoding(source, columns, split), columns[-1]
    feature = source.features[label_column]
    if isinstance(feature, Value) and "string" in feature.dtype:
        value = next((row[label_column] for row in rows.select_columns([label_column])), None)
        if isinstance(as_class(value), str) and not any(isinstance(as_class(label), str) for label in labels):
            raise ValueError(
                f"column {label_column!r} of the {split} set holds names, like {value!r}: give the classes of the tasks by "
                "name"
            )
    return rows.filter(_is_in, input_columns=[label_column], fn_kwargs={"values": frozenset(labels), "split": split})


def _filter_domain(source: Any, columns: Sequence[str], domain_column: str, name: str, split: str) -> IterableDataset:
    """The rows of a domain: the source of that name, or the rows with that name in the domain column."""
    if isinstance(source, Mapping):
        if name not in source:
            raise ValueError(f"there is no {split} set of domain {name!r}, only of {list(source)}")
        return without_decoding(source[name], columns, split)
    rows = without_decoding(source, [*columns, domain_column], split)
    by_name = {known: value for value, known in read_class_names(source, domain_column).items()}
    return rows.filter(_has_text, input_columns=[domain_column], fn_kwargs={"text": str(by_name.get(name, name))})


def _is_in(value: Any, values: frozenset[Any], split: str) -> bool:
    if not isinstance(value, str) and (not isinstance(value, int | float) or value not in values):
        check_class_id(value, f"a label of the {split} set")
    return value in values


def _has_text(value: Any, text: str) -> bool:
    return str(value) == text
