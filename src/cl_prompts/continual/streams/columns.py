"""Reading and checking the columns of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, IterableDataset

from cl_prompts.continual.streams.loading import Rows
from cl_prompts.interfaces import IGNORE_INDEX


def check_columns(data: Any, columns: Sequence[str], split: str) -> None:
    """Raise ValueError if a data set lacks one of the columns. `split` names the data set in the message."""
    known = getattr(data, "column_names", None)
    if known is None:
        return
    for name in columns:
        if name not in known:
            raise ValueError(f"the {split} set has no column {name!r}, its columns are {sorted(known)}")


def read_column(data: Any, name: str, split: str) -> Any:
    """All values of a column as an array [rows].

    Args:
        data: data set that gives columns by name.
        name: name of the column.
        split: name of the data set in messages, as "training" or "test".

    Raises:
        ValueError: the data set has no such column, the column holds lists, or the data set can only be read in order.
    """
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"the {split} set is an IterableDataset, which has no rows by number: use IterableClassIncrementalStream or "
            "IterableDomainIncrementalStream, or load it without streaming=True"
        )
    check_columns(data, [name], split)
    try:
        values = np.asarray(data[name])
    except ValueError:  # lists of unequal length
        values = None
    if values is None or values.ndim != 1:
        raise ValueError(f"column {name!r} of the {split} set holds lists, like {data[name][0]!r}: give each row one value")
    return values


def read_labels(data: Any, label_column: str, split: str) -> Rows:
    """Class id of each row [rows]. Arguments as for `read_column`.

    Raises:
        ValueError: a label is not an integer >= 0, or there are no rows.
    """
    values = read_column(data, label_column, split)
    if not len(values):
        raise ValueError(f"the {split} set is empty")
    if values.dtype.kind not in "iu":
        wrong = [(row, value) for row, value in enumerate(values.tolist()) if type(value) is not int]
        # A single NaN turns integers into floats, so it is reported first.
        row, value = next(((r, v) for r, v in wrong if v != v), wrong[0])
        raise ValueError(
            f"column {label_column!r} of the {split} set holds {value!r} in row {row}, which is no class id: encode the "
            "classes as integers, for example with class_encode_column"
        )
    if values.min() < 0:
        row = int(np.argmax(values < 0))
        raise ValueError(
            f"the label of {split} row {row} is {int(values[row])}: class ids start at 0 ({IGNORE_INDEX} marks padding)"
        )
    return values.astype(np.int64)


def read_class_names(data: Any, label_column: str) -> dict[int, str]:
    """Class names by id; empty if the column is not a `ClassLabel`."""
    feature = (getattr(data, "features", None) or {}).get(label_column)
    return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}


def check_test_labels(train_labels: Rows, test_labels: Rows) -> None:
    """Raise ValueError if there are test images of classes without training images."""
    unknown = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if unknown:
        raise ValueError(f"test images are of classes {unknown}, which no training image has")
