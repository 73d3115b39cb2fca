"""Labels of data sets, as class ids and class names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, overload

import numpy as np
from datasets import ClassLabel, Value

from cl_prompts.continual.streams.columns import read_class_names, read_column
from cl_prompts.continual.streams.data_sets import is_missing
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.text import short_repr


LARGEST = np.iinfo(np.int64).max  # class id


def read_labels(data: Any, label_column: str, split: str, names: Mapping[int, str] | None = None) -> Rows:
    """Class id of each row [rows].

    Whole numbers of any type are class ids. Strings are class names, or ids if they are numbers.

    Args:
        data: data set that gives columns by name.
        label_column: name of the column of labels.
        split: name of the data set in messages, as "training" or "test".
        names: class names by id, for labels that are strings.

    Raises:
        ValueError: a label is no class id and no known name, or there are no rows.
    """
    values = read_column(data, label_column, split)
    if not len(values):
        raise ValueError(f"the {split} set is empty")
    if values.dtype.kind not in "iub":
        values = _ids_of(values.tolist(), {name: c for c, name in (names or {}).items()}, label_column, split)
    if values.min() < 0:
        row = int(np.argmax(values < 0))
        raise ValueError(
            f"the label of {split} row {row} is {int(values[row])}: class ids start at 0 ({IGNORE_INDEX} marks padding)"
        )
    return values.astype(np.int64)


def _ids_of(values: list[Any], ids: Mapping[str, int], label_column: str, split: str) -> Any:
    """Labels of any type as an array of integers."""
    if any(isinstance(value, str) for value in values):
        found = [ids.get(value, as_class(value)) if isinstance(value, str) else None for value in values]
    else:
        found = [_whole_number(value) for value in values]
    wrong = [row for row, value in enumerate(found) if not isinstance(value, int) or value > LARGEST]
    if not wrong:
        return np.array(found, dtype=np.int64)
    # A single NaN turns integers into floats, so it is reported first.
    row = next((row for row in wrong if is_missing(values[row])), wrong[0])
    value = values[row]
    if isinstance(value, str) and ids:  # names of the training set
        unknown = sorted({values[row] for row in wrong if isinstance(values[row], str)})
        raise ValueError(f"{split} images are of classes {short_repr(unknown)}, which no training image has")
    if is_missing(value):
        mend = f"leave such rows out, for example with data.filter(lambda row: row[{label_column!r}] is not None)"
    elif not isinstance(value, str) and (name := next((v for v in values if isinstance(v, str)), None)) is not None:
        mend = f"other rows hold names, like {short_repr(name)}: give all rows a name, or all an id"
    else:
        mend = "encode the classes as integers, for example with class_encode_column"
    raise ValueError(
        f"column {label_column!r} of the {split} set holds {short_repr(value)} in row {row}, which is no class id: {mend}"
    )


def _whole_number(value: Any) -> int | None:
    try:
        return int(value) if isinstance(value, float) and value.is_integer() else index(value)
    except (TypeError, ValueError):
        return None


def as_class(value: Any) -> Any:
    """A class as written in a column of strings: "12" is class 12, every other string is a name."""
    is_number = isinstance(value, str) and value.isdecimal() and str(int(value)) == value
    return int(value) if is_number else value


def common_class_names(training: Sequence[Any], test: Sequence[Any], label_column: str) -> dict[int, str]:
    """Class names by id, from ClassLabel columns, or from columns of strings in ascending order; empty if there are none.

    Args:
        training: training sets of the same classes.
        test: test sets of these classes.
        label_column: name of the column of labels.

    Raises:
        ValueError: two data sets give an id different names.
    """
    most = names_of_ids([*training, *test], label_column)
    if most:
        return most
    names = names_of(text for part in training for text in _texts(part, label_column))
    if names and not all(_texts(part, label_column) for part in test):
        raise ValueError(f"training labels are names, like {names[0]!r}, and test labels are not: give both the same kind")
    return names


def names_of_ids(parts: Sequence[Any], label_column: str) -> dict[int, str]:
    """Class names by id from ClassLabel columns of data sets; empty if there are none.

    Args:
        parts: the data sets.
        label_column: name of the column of labels.

    Raises:
        ValueError: two data sets give an id different names.
    """
    known = [names for part in parts if (names := read_class_names(part, label_column))]
    most = max(known, key=len, default={})
    for names in known:
        for c, name in names.items():
            if most[c] != name:
                raise ValueError(
                    f"the data sets have different class names for one id, {c}: {short_repr(most[c])} and "
                    f"{short_repr(name)}; give all the same ClassLabel first"
                )
    return most


def names_of(texts: Iterable[str]) -> dict[int, str]:
    """Class names by id, in ascending order of the names; empty if all texts are numbers, which are ids."""
    names = sorted(set(texts))
    return dict(enumerate(names)) if any(isinstance(as_class(name), str) for name in names) else {}


def _texts(data: Any, label_column: str) -> set[str]:
    """The different strings in a column of labels."""
    feature = (getattr(data, "features", None) or {}).get(label_column)
    if isinstance(feature, Value) and "string" not in feature.dtype:
        return set()
    if label_column not in (getattr(data, "column_names", None) or [label_column]):
        return set()
    return {str(value) for value in data[label_column] if isinstance(value, str)}


def check_test_labels(train_labels: Rows, test_labels: Rows) -> None:
    """Raise ValueError if there are test images of classes without training images."""
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise ValueError(f"test images are of classes {unknown}, which no training image has")


# ---- tasks ---------------------------------------------------------------------------------------------------------------


@overload
def split_classes(classes: Iterable[str], tasks: int | Sequence[int], seed: int | None = None) -> list[list[str]]: ...
@overload
def split_classes(classes: int | Iterable[int], tasks: int | Sequence[int], seed: int | None = None) -> list[list[int]]: ...
def split_classes(classes: Any, tasks: Any, seed: int | None = None) -> list[list[Any]]:
    """Classes split into tasks, in ascending or in random order.

    Args:
        classes: class ids or class names, a column of labels, a `ClassLabel`, or the number of classes with ids from 0.
        tasks: number of tasks, of (nearly) equal size, or the number of classes of each task.
        seed: seed of the random order; None: ascending.

    Raises:
        ValueError: something is no class, there are more tasks than classes, or sizes do not add up to the number of
            classes.
    """
    order = _distinct(classes)
    number = _whole_number(tasks)
    if number is not None:
        if isinstance(tasks, bool) or not 1 <= number <= len(order):
            raise ValueError(f"{len(order)} classes cannot be split into {tasks} tasks")
        sizes = [len(part) for part in np.array_split(np.arange(len(order)), number)]
    else:
        given = list(tasks) if isinstance(tasks, Iterable) and not isinstance(tasks, str) else [tasks]
        sizes = [size for value in given if (size := _whole_number(value)) is not None]
        if len(sizes) < len(given) or not sizes or min(sizes) < 1 or sum(sizes) != len(order):
            raise ValueError(
                f"{len(order)} classes cannot be split into tasks of {short_repr(tasks)}: give positive sizes with sum "
                f"{len(order)}"
            )
    if seed is not None:
        if seed < 0:
            raise ValueError(f"seed={seed} must be a non-negative integer, or None for ascending order")
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    ends = np.cumsum(sizes)
    return [order[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _distinct(classes: Any) -> list[Any]:
    """The different classes, ascending. Raises ValueError if they are neither all ids nor all names."""
    if isinstance(classes, ClassLabel):
        classes = classes.num_classes
    number = None if isinstance(classes, bool | str) else _whole_number(classes)
    values = range(number) if number is not None else classes
    if (number is not None and number < 0) or isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"classes={short_repr(classes)}: give class ids, class names, or the number of classes")
    listed = list(values)
    found = [as_class(value) if isinstance(value, str) else _whole_number(value) for value in listed]
    if any(isinstance(value, str) for value in found):
        found = [value if isinstance(value, str) else None for value in listed]
    wrong = [value for value, known in zip(listed, found, strict=True) if known is None]
    if wrong:
        raise ValueError(f"classes name {short_repr(wrong[0])}: give class ids, or class names only")
    return sorted(set(found))


def validate_tasks(tasks: Sequence[Sequence[Any]], names: Mapping[int, str] | None = None) -> list[list[int]]:
    """Class ids of each task as lists of integers.

    Args:
        tasks: class ids or class names of each task.
        names: class names by id.

    Raises:
        ValueError: a task has no classes, a class is given twice, or something is no class.
    """
    if isinstance(tasks, str) or not isinstance(tasks, Iterable):
        raise ValueError(f"tasks={tasks!r}: give the class ids of each task (split_classes(classes, tasks) makes them)")
    ids = {name: c for c, name in (names or {}).items()}
    found = [_class_ids(number, classes, ids) for number, classes in enumerate(tasks)]
    seen: set[int] = set()
    for number, classes in enumerate(found):
        if not classes:
            raise ValueError(f"task {number} has no classes")
        repeated = sorted({c for c in classes if classes.count(c) > 1})
        if repeated:
            raise ValueError(f"task {number} names classes {repeated} twice")
        earlier = sorted(seen & set(classes))
        if earlier:
            raise ValueError(f"task {number} repeats classes {earlier}: a class can be in one task only")
        seen |= set(classes)
    return found


def _class_ids(number: int, classes: Any, ids: Mapping[str, int]) -> list[int]:
    """The class ids of task `number`. Raises ValueError if they are none."""
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ValueError(f"task {number} is {classes!r}: give a list of class ids for each task")
    found = []
    for value in classes:
        known = ids.get(value, as_class(value)) if isinstance(value, str) else value
        try:
            found.append(index(known))
        except TypeError as error:
            mend = (
                f"the class names are {short_repr(list(ids))}" if ids else "class ids are integers, and names are not known"
            )
            raise ValueError(f"task {number} names {value!r}, which is no class id: {mend}") from error
        if found[-1] < 0:
            raise ValueError(f"task {number} names {value!r}: class ids start at 0 ({IGNORE_INDEX} marks padding)")
    return found


def check_class_id(value: Any, what: str) -> None:
    """Raise ValueError if a label, which `what` describes, is neither a class id nor a name."""
    number = _whole_number(value)
    if isinstance(value, str) or (number is not None and 0 <= number <= LARGEST):
        return
    raise ValueError(
        f"{what} is {short_repr(value)}: class ids start at 0 and are whole ({IGNORE_INDEX} marks padding), so give all "
        "rows an id or all a name, or leave such rows out"
    )


def names_in_tasks(tasks: Sequence[Sequence[Any]], data: Any, label_column: str) -> dict[int, str]:
    """Class names by id for labels that cannot be listed: those that the data set knows or, for labels that are strings,
    those that tasks name."""
    known = read_class_names(data, label_column)
    feature = (getattr(data, "features", None) or {}).get(label_column)
    written = not isinstance(feature, Value) or "string" in feature.dtype
    if known or not written or isinstance(tasks, str) or not isinstance(tasks, Iterable):
        return known
    parts = [classes for classes in tasks if isinstance(classes, Iterable) and not isinstance(classes, str)]
    return names_of(value for classes in parts for value in classes if isinstance(value, str))


def label_ids(classes: Iterable[int], names: Mapping[int, str]) -> dict[Any, int]:
    """Class ids by what a label may be: the id, the id as text, or the class name."""
    written = {c: c for c in classes}
    return {**written, **{str(c): c for c in written}, **{names[c]: c for c in written if c in names}}
