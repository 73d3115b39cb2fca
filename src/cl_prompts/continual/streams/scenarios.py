"""Scenarios with tasks: new classes, new domains of the same classes, several data sets in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
from datasets import concatenate_datasets
from torch import Tensor

from cl_prompts.continual.streams.augmentation import CropAndFlip
from cl_prompts.continual.streams.columns import check_columns, check_test_labels, column, labels_of, names_of
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.stream import Stream, Task


class ClassIncrementalStream(Stream):
    """Each task brings new classes; at test nobody tells the task.

    Images of classes that no task names are left out.

    Args:
        train: data set with an image and a label column (`datasets.Dataset`, or anything that gives rows by number and
            columns by name).
        test: likewise.
        tasks: class ids of each task, in order (`split_classes`).
        transform: image -> float tensor [3, H, W], the base's image processor.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a task has no class, a class comes twice, or has no images in `train` or `test`; columns are missing,
            or labels are no class ids.
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
        train_labels = labels_of(train, label_column, "training")
        test_labels = labels_of(test, label_column, "test")
        check_test_labels(train_labels, test_labels)
        classes_of = checked_tasks(tasks)
        made = []
        for number, classes in enumerate(classes_of):
            for split, labels in (("training", train_labels), ("test", test_labels)):
                absent = sorted(set(classes) - set(labels.tolist()))
                if absent:
                    raise ValueError(f"task {number}: classes {absent} have no {split} images")
            train_rows, test_rows = (np.flatnonzero(np.isin(labels, classes)) for labels in (train_labels, test_labels))
            made.append(Task(number, classes, train_rows, test_rows))
        super().__init__(
            train,
            test,
            made,
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names_of(train, label_column),
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


class DomainIncrementalStream(Stream):
    """Each task brings another domain of the same classes; at test nobody tells the domain.

    Args:
        train: data set with image, label and domain columns, or one data set for each domain by its name.
        test: likewise, or one for all domains (`common_test`).
        transform: image -> float tensor [3, H, W], the base's image processor.
        domains: names or values of the domains in order; None: the order of the data sets, of the column's names, or
            ascending. Images of domains that are not named are left out.
        domain_column: its name, where there is one.
        common_test: `test` is one data set for all domains (as CORe50's): every task is tested on all of it.
        image_column: name of the column of images.
        label_column: name of the column of labels.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a domain comes twice, or lacks training or test images of a class; columns are missing, or labels are no
            class ids.
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
        names = _same_names(train, test, label_column)
        train_rows, train_labels, train_domains = by_domain(train, image_column, label_column, domain_column, "training")
        if common_test:
            test_rows, test_labels = test, labels_of(test, label_column, "test")
            test_domains = None
        else:
            test_rows, test_labels, test_domains = by_domain(test, image_column, label_column, domain_column, "test")
        check_test_labels(train_labels, test_labels)
        order = _domain_order(train, train_domains, domain_column) if domains is None else [str(d) for d in domains]
        if domains is None and test_domains is not None and (strange := sorted({*test_domains.tolist()} - {*order})):
            raise ValueError(f"test images are of domains {strange}, which no training image is of")
        twice = sorted({name for name in order if order.count(name) > 1})
        if twice:
            raise ValueError(f"domains {twice} come twice")
        classes = sorted(set(train_labels[np.isin(train_domains, order)].tolist()))
        tasks = []
        for number, name in enumerate(order):
            own_train = np.flatnonzero(train_domains == name)
            own_test = np.arange(len(test_labels)) if test_domains is None else np.flatnonzero(test_domains == name)
            for split, labels in (("training", train_labels[own_train]), ("test", test_labels[own_test])):
                if not len(labels):
                    known = np.unique(train_domains).tolist()
                    raise ValueError(f"domain {name!r} has no {split} images; the training set has domains {known}")
                absent = sorted(set(classes) - set(labels.tolist()))
                if absent:
                    raise ValueError(
                        f"domain {name!r} has no {split} images of classes {absent}: all domains must have the same classes"
                    )
            tasks.append(Task(number, classes, own_train, own_test, name, revisit=number > 0))
        super().__init__(
            train_rows,
            test_rows,
            tasks,
            transform,
            train_labels=train_labels,
            test_labels=test_labels,
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


class DatasetSequenceStream(Stream):
    """Each task brings another data set with classes of its own, as 5-datasets (Ebrahimi et al., ECCV 2020).

    Class ids are those of the data set plus the number of classes of the data sets before it; names get the data set's
    name in front.

    Args:
        train: data sets by name, in order.
        test: data sets with the same names.
        transform: image -> float tensor [3, H, W], the base's image processor; it sees the images of all data sets.
        image_column: name of the column of images, the same in all.
        label_column: name of the column of labels, the same in all.
        augmentation: see `Stream`.
        on_bad_image: see `Stream`.

    Raises:
        ValueError: a data set has no test set, lacks a column, or test images of a class; labels are no class ids.
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
                f"training sets are {list(train)} and test sets {list(test)}: give the same names in one order"
            )
        names: dict[int, str] = {}
        labels: tuple[list[Rows], list[Rows]] = ([], [])
        tasks = []
        offset, begin = 0, [0, 0]
        for number, name in enumerate(train):
            own = [labels_of(part[name], label_column, f"{s} {name}") for part, s in ((train, "training"), (test, "test"))]
            check_test_labels(*own)
            absent = sorted(set(own[0].tolist()) - set(own[1].tolist()))
            if absent:
                raise ValueError(f"data set {name!r}: classes {absent} have no test images")
            own_names = names_of(train[name], label_column)
            train_rows, test_rows = (np.arange(len(part)) + start for part, start in zip(own, begin, strict=True))
            classes = [int(c) + offset for c in np.unique(own[0])]
            tasks.append(Task(number, classes, train_rows, test_rows, name))
            names |= {c + offset: f"{name}/{own_names.get(c, c)}" for c in np.unique(own[0]).tolist()}
            for part, found in zip(labels, own, strict=True):
                part.append(found + offset)
            begin = [start + len(part) for start, part in zip(begin, own, strict=True)]
            offset += len(own_names) or int(own[0].max()) + 1
        if not tasks:
            raise ValueError("a stream needs at least one data set")
        super().__init__(
            _joined(train, image_column, "training"),
            _joined(test, image_column, "test"),
            tasks,
            transform,
            train_labels=np.concatenate(labels[0]),
            test_labels=np.concatenate(labels[1]),
            names=names,
            image_column=image_column,
            augmentation=augmentation,
            on_bad_image=on_bad_image,
        )


def split_classes(classes: Sequence[int], tasks: int | Sequence[int], seed: int | None = None) -> list[list[int]]:
    """Classes in groups, in ascending order or, with a seed, in a random one.

    Args:
        classes: class ids.
        tasks: number of groups of (nearly) equal size, or the size of each.
        seed: of the order; None: ascending.

    Raises:
        ValueError: there are more tasks than classes, or sizes do not add up to the number of classes.
    """
    order = sorted(classes)
    if isinstance(tasks, int):
        if not 1 <= tasks <= len(order):
            raise ValueError(f"{len(order)} classes cannot be split into {tasks} tasks")
        sizes = [len(part) for part in np.array_split(np.arange(len(order)), tasks)]
    else:
        sizes = [int(size) for size in tasks]
        if not sizes or min(sizes) < 1 or sum(sizes) != len(order):
            raise ValueError(
                f"{len(order)} classes cannot be split into tasks of {sizes}: positive sizes must add up to it"
            )
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    ends = np.cumsum(sizes)
    return [[int(c) for c in order[end - size : end]] for size, end in zip(sizes, ends, strict=True)]


def checked_tasks(tasks: Sequence[Sequence[int]]) -> list[list[int]]:
    """Class ids of each task, none of which comes twice.

    Raises:
        ValueError: one does, a task has none, or what is given is no class ids.
    """
    if not isinstance(tasks, Iterable):
        raise ValueError(f"tasks={tasks!r}: give the class ids of each task (split_classes(classes, tasks) makes them)")
    found = [_class_ids(number, classes) for number, classes in enumerate(tasks)]
    seen: set[int] = set()
    for number, classes in enumerate(found):
        if not classes:
            raise ValueError(f"task {number} has no classes")
        twice = sorted({c for c in classes if classes.count(c) > 1})
        if twice:
            raise ValueError(f"task {number} names classes {twice} twice")
        again = sorted(seen & set(classes))
        if again:
            raise ValueError(f"task {number} repeats classes {again}: in a class-incremental stream each comes once")
        seen |= set(classes)
    return found


def _class_ids(number: int, classes: Any) -> list[int]:
    """The class ids of task `number`. Raises ValueError if they are none."""
    if not isinstance(classes, Iterable):
        raise ValueError(f"task {number} is {classes!r}: give a list of class ids for each task")
    ids = []
    for value in classes:
        try:
            ids.append(index(value))
        except TypeError as error:
            raise ValueError(f"task {number} names {value!r}, which is no class id: class ids are integers") from error
    return ids


def _joined(parts: Mapping[str, Any], image_column: str, split: str) -> Any:
    """The images of several data sets, one behind the other."""
    for name, part in parts.items():
        check_columns(part, [image_column], f"{split} {name}")
    return concatenate_datasets([part.select_columns([image_column]) for part in parts.values()])


def by_domain(rows: Any, image_column: str, label_column: str, domain_column: str, split: str) -> tuple[Any, Rows, Any]:
    """Images, class ids, and the name of each row's domain."""
    if isinstance(rows, Mapping):
        labels = [labels_of(part, label_column, f"{split} {name}") for name, part in rows.items()]
        domains = np.repeat([str(name) for name in rows], [len(part) for part in labels])
        return _joined(rows, image_column, split), np.concatenate(labels), domains
    values = column(rows, domain_column, split)
    names = names_of(rows, domain_column)
    return rows, labels_of(rows, label_column, split), np.array([names.get(v, str(v)) for v in values.tolist()])


def _domain_order(rows: Any, found: Any, domain_column: str) -> list[str]:
    """The domains in the order of the data sets, of the column's names, or of its values."""
    if isinstance(rows, Mapping):
        return [str(name) for name in rows]
    present = set(found.tolist())
    if names := names_of(rows, domain_column):
        return [name for name in names.values() if name in present]
    return [str(value) for value in np.unique(column(rows, domain_column, "training"))]


def _same_names(train: Any, test: Any, label_column: str) -> dict[int, str]:
    """The class names, which all data sets must share."""
    parts = [p for rows in (train, test) for p in (rows.values() if isinstance(rows, Mapping) else [rows])]
    known = [names for names in (names_of(part, label_column) for part in parts) if names]
    if any(names != known[0] for names in known):
        raise ValueError("the data sets of the domains name their classes differently: bring them into one order first")
    return known[0] if known else {}
