"""Columns of data sets, looked at before anything is learnt from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, IterableDataset

from cl_prompts.continual.streams.loading import Rows
from cl_prompts.interfaces import IGNORE_INDEX


def check_columns(rows: Any, columns: Sequence[str], split: str) -> None:
    """Raise ValueError if a data set lacks a column."""
    known = getattr(rows, "column_names", None)
    if known is None:
        return
    for name in columns:
        if name not in known:
            raise ValueError(f"the {split} set has no column {name!r}, only {sorted(known)}: name the right one")


def column(rows: Any, name: str, split: str) -> Any:
    """All values of a column as an array.

    Raises:
        ValueError: the data set has no such column, or lists in it, or can only be read in order.
    """
    if isinstance(rows, IterableDataset):
        raise ValueError(
            f"the {split} set is an IterableDataset, which has no rows by number: use IterableClassIncrementalStream or "
            "IterableDomainIncrementalStream, or load it without streaming=True"
        )
    check_columns(rows, [name], split)
    try:
        values = np.asarray(rows[name])
    except ValueError:  # lists of unequal length
        values = None
    if values is None or values.ndim != 1:
        raise ValueError(f"column {name!r} of the {split} set holds lists, like {rows[name][0]!r}: give each row one value")
    return values


def labels_of(rows: Any, label_column: str, split: str) -> Rows:
    """Class id of each row.

    Raises:
        ValueError: they are no class ids, or there are none.
    """
    values = column(rows, label_column, split)
    if not len(values):
        raise ValueError(f"the {split} set is empty")
    if values.dtype.kind not in "iu":
        strange = [(row, value) for row, value in enumerate(values.tolist()) if type(value) is not int]
        row, value = next(((r, v) for r, v in strange if v != v), strange[0])  # NaN makes floats of integers
        raise ValueError(
            f"column {label_column!r} of the {split} set holds {value!r} in row {row}, which is no class id: encode it"
        )
    if values.min() < 0:
        row = int(np.argmax(values < 0))
        raise ValueError(
            f"the label of {split} row {row} is {int(values[row])}: class ids start at 0 ({IGNORE_INDEX} marks padding)"
        )
    return values.astype(np.int64)


def names_of(rows: Any, label_column: str) -> dict[int, str]:
    """Class names by id, where the data set knows them."""
    feature = (getattr(rows, "features", None) or {}).get(label_column)
    return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}


def check_test_labels(train_labels: Rows, test_labels: Rows) -> None:
    """Raise ValueError if test images are of classes that are never learnt."""
    strange = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if strange:
        raise ValueError(f"test images are of classes {strange}, which no training image has")
