"""Scenarios with tasks: new classes, new domains of the same classes, or a new data set in each task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_columns, read_class_names, read_column
from cl_prompts.continual.streams.data_sets import SPLITS, as_rows, concatenated
from cl_prompts.continual.streams.indexed import IndexedStream, IndexedTask
from cl_prompts.continual.streams.labels import check_test_labels, common_class_names, read_labels, validate_tasks
from cl_prompts.continual.streams.loading import Rows


class ClassIncrementalStream(IndexedStream):
    """Each task brings new classes; at test time the task is unknown.

    Images of classes that are in no task are left out.

    Args:
        train: data set with images and labels; see `as_rows` for the accepted kinds.
        test: test data set.
        tasks: class ids or class names of each task, in order; see `split_classes`.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a task has no classes, a class is given twice or has no images in `train` or `test`, a column is
            missing, or labels are no class ids.
    """

    scenario = "class-incremental"

    def __init__(
        self,
        train: Any,
        test: Any,
        tasks: Sequence[Sequence[int]],
        transform: Callable[[Any], Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        train = as_rows(train, image_column, label_column, "training")
        test = as_rows(test, image_column, label_column, "test")
        names = common_class_names([train], [test], label_column)
        train_labels = read_labels(train, label_column, "training", names)
        test_labels = read_labels(test, label_column, "test", names)
        check_test_labels(train_labels, test_labels)
        super().__init__(
            train,
            test,
            [
                IndexedTask(
                    number,
                    classes,
                    train_rows=rows_of_classes(train_labels, classes, "training", number),
                    test_rows=rows_of_classes(test_labels, classes, "test", number),
                )
                for number, classes in enumerate(validate_tasks(tasks, names))
            ],
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


class DomainIncrementalStream(IndexedStream):
    """Each task brings another domain of the same classes; at test time the domain is unknown.

    Args:
        train: data set with image, label and domain columns, or one data set per domain by its name; see `as_rows` for the
            accepted kinds.
        test: test data sets of the same kind, or one for all domains (`common_test`).
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        domains: names or values of the domains in order; None: the order of the data sets, of the names of the column, or
            ascending. Images of other domains are left out.
        domain_column: name of the column of domains, if there is one.
        common_test: `test` is one data set for all domains (as in CORe50): every task is tested on all of it.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a domain is given twice, or lacks training or test images of a class; a column is missing, or labels are
            no class ids.
    """

    scenario = "domain-incremental"

    def __init__(
        self,
        train: Any,
        test: Any,
        transform: Callable[[Any], Tensor],
        *,
        domains: Sequence[Any] | None = None,
        domain_column: str = "domain",
        common_test: bool = False,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        train = rows_by_domain(train, image_column, label_column, "training")
        test = (as_rows if common_test else rows_by_domain)(test, image_column, label_column, "test")
        names = common_class_names(parts_of(train), parts_of(test), label_column)
        columns = (image_column, label_column, domain_column)
        train_data, train_labels, train_domains = read_domains(train, columns, names, "training")
        if common_test:
            test_data, test_labels, test_domains = test, read_labels(test, label_column, "test", names), None
        else:
            test_data, test_labels, test_domains = read_domains(test, columns, names, "test")
        check_test_labels(train_labels, test_labels)
        order = _domain_order(train, train_domains, domain_column) if domains is None else [str(d) for d in domains]
        if domains is None and test_domains is not None and (unknown := sorted({*test_domains.tolist()} - {*order})):
            raise ValueError(f"test images are of domains {unknown}, which no training image is of")
        repeated = sorted({name for name in order if order.count(name) > 1})
        if repeated:
            raise ValueError(f"domains {repeated} are given twice")
        classes = sorted(set(train_labels[np.isin(train_domains, order)].tolist()))
        tasks = []
        for number, name in enumerate(order):
            train_rows = np.flatnonzero(train_domains == name)
            test_rows = np.arange(len(test_labels)) if test_domains is None else np.flatnonzero(test_domains == name)
            for split, labels in (("training", train_labels[train_rows]), ("test", test_labels[test_rows])):
                if not len(labels):
                    known = np.unique(train_domains).tolist()
                    raise ValueError(f"domain {name!r} has no {split} images; the training set has domains {known}")
                absent = sorted(set(classes) - set(labels.tolist()))
                if absent:
                    raise ValueError(
                        f"domain {name!r} has no {split} images of classes {absent}: all domains must have the same classes"
                    )
            tasks.append(IndexedTask(number, classes, name, number > 0, train_rows=train_rows, test_rows=test_rows))
        super().__init__(
            train_data,
            test_data,
            tasks,
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


class DatasetSequenceStream(IndexedStream):
    """Each task brings another data set with its own classes, as 5-datasets (Ebrahimi et al., ECCV 2020).

    A class id is that of the data set plus the number of classes of all data sets before it. A class name is
    "DATA SET/CLASS".

    Args:
        train: data sets by name, in order; see `as_rows` for the accepted kinds.
        test: test data sets with the same names in the same order.
        transform: image -> float tensor [3, H, W], or the image processor of the base model.
        image_column: name of the column of images, the same in all data sets.
        label_column: name of the column of labels, the same in all data sets.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a data set has no test set, lacks a column or test images of a class, or labels are no class ids.
    """

    scenario = "dataset-sequence"

    def __init__(
        self,
        train: Mapping[str, Any],
        test: Mapping[str, Any],
        transform: Callable[[Any], Tensor],
        *,
        image_column: str = "image",
        label_column: str = "label",
        augmentation: CropAndFlip | None = None,
        on_bad_image: str = "stop",
    ) -> None:
        if list(train) != list(test):
            raise ValueError(
                f"training sets are {list(train)} and test sets {list(test)}: give the same names in the same order"
            )
        if not train:
            raise ValueError("a stream needs at least one data set")
        train = {name: as_rows(part, image_column, label_column, f"training {name}") for name, part in train.items()}
        test = {name: as_rows(part, image_column, label_column, f"test {name}") for name, part in test.items()}
        names: dict[int, str] = {}
        train_labels: list[Rows] = []
        test_labels: list[Rows] = []
        tasks = []
        class_offset = train_offset = test_offset = 0
        for number, name in enumerate(train):
            own_names = common_class_names([train[name]], [test[name]], label_column)
            own_train = read_labels(train[name], label_column, f"training {name}", own_names)
            own_test = read_labels(test[name], label_column, f"test {name}", own_names)
            check_test_labels(own_train, own_test)
            own_classes = np.unique(own_train).tolist()
            absent = sorted(set(own_classes) - set(own_test.tolist()))
            if absent:
                raise ValueError(f"data set {name!r}: classes {absent} have no test images")
            names |= {c + class_offset: f"{name}/{own_names.get(c, c)}" for c in own_classes}
            tasks.append(
                IndexedTask(
                    number,
                    [c + class_offset for c in own_classes],
                    name,
                    train_rows=np.arange(len(own_train)) + train_offset,
                    test_rows=np.arange(len(own_test)) + test_offset,
                )
            )
            train_labels.append(own_train + class_offset)
            test_labels.append(own_test + class_offset)
            train_offset, test_offset = train_offset + len(own_train), test_offset + len(own_test)
            class_offset += len(own_names) or own_classes[-1] + 1
        super().__init__(
            _concatenate(train, image_column, "training"),
            _concatenate(test, image_column, "test"),
            tasks,
            transform,
            train_labels=np.concatenate(train_labels),
            test_labels=np.concatenate(test_labels),
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


def rows_of_classes(labels: Rows, classes: Sequence[int], split: str, task: int | None = None) -> Rows:
    """Row numbers of the images of some classes, ascending.

    Args:
        labels: class id of each row [rows].
        classes: class ids.
        split: "training" or "test", for the message.
        task: number of the task of these classes, for the message.

    Raises:
        ValueError: a class has no images.
    """
    absent = sorted(set(classes) - set(labels.tolist()))
    if absent:
        raise ValueError(f"{'' if task is None else f'task {task}: '}classes {absent} have no {split} images")
    return np.flatnonzero(np.isin(labels, classes))


def rows_by_domain(data: Any, image_column: str, label_column: str, split: str) -> Any:
    """A data set as `as_rows` gives it or, for one data set per domain, a dict of them."""
    if not isinstance(data, Mapping) or {image_column, label_column} <= data.keys():
        return as_rows(data, image_column, label_column, split)
    if data.keys() <= SPLITS and "train" in data:
        raise ValueError(f"the {split} set has the splits {list(data)}, which are no domains: pass one, data['train']")
    return {str(name): as_rows(part, image_column, label_column, f"{split} {name}") for name, part in data.items()}


def read_domains(data: Any, columns: tuple[str, str, str], names: Mapping[int, str], split: str) -> tuple[Any, Rows, Any]:
    """The images of all domains as one data set, the class id of each row, and the name of the domain of each row.

    Args:
        data: from `rows_by_domain`.
        columns: names of the columns of images, labels and domains.
        names: class names by id, for labels that are strings.
        split: "training" or "test", for messages.
    """
    image_column, label_column, domain_column = columns
    if isinstance(data, Mapping):
        labels = [read_labels(part, label_column, f"{split} {name}", names) for name, part in data.items()]
        domains = np.repeat(list(data), [len(part) for part in labels])
        return _concatenate(data, image_column, split), np.concatenate(labels), domains
    values = read_column(data, domain_column, split)
    known = read_class_names(data, domain_column)
    labels_of_all = read_labels(data, label_column, split, names)
    return data, labels_of_all, np.array([known.get(v, str(v)) for v in values.tolist()])


def _concatenate(parts: Mapping[str, Any], image_column: str, split: str) -> Any:
    """The images of several data sets as one data set."""
    for name, part in parts.items():
        check_columns(part, [image_column], f"{split} {name}")
    return concatenated(parts, image_column)


def parts_of(data: Any) -> list[Any]:
    """Data sets that are given by name, or the one that is given."""
    return list(data.values()) if isinstance(data, Mapping) else [data]


def _domain_order(data: Any, domain_of_row: Any, domain_column: str) -> list[str]:
    """The domains in the order of the data sets, of the names of the column, or of its values."""
    if isinstance(data, Mapping):
        return [str(name) for name in data]
    present = set(domain_of_row.tolist())
    if names := read_class_names(data, domain_column):
        return [name for name in names.values() if name in present]
    return [str(value) for value in np.unique(read_column(data, domain_column, "training"))]
