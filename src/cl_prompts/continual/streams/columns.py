"""Reading and checking the columns of data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset

from cl_prompts.continual.streams.data_sets import Examples, is_own_error


def check_columns(data: Any, columns: Sequence[str], split: str) -> None:
    """Raise ValueError if a data set lacks one of the columns. `split` names the data set in the message."""
    known = getattr(data, "column_names", None)
    if known is None:
        return
    for name in columns:
        made = isinstance(data, Dataset) and data.format["type"] == "custom" and len(data)  # a transform may make columns
        if name not in known and not (made and name in data[0]):
            raise ValueError(
                f"the {split} set has no column {name!r}, its columns are {sorted(known)}: choose with image_column= and "
                "label_column="
            )


def read_column(data: Any, name: str, split: str) -> Any:
    """All values of a column as an array [rows].

    Args:
        data: data set that gives columns by name.
        name: name of the column.
        split: name of the data set in messages, as "training" or "test".

    Raises:
        ValueError: the data set has no such column, or the column holds lists.
    """
    check_columns(data, [name], split)
    by_transform = isinstance(data, Dataset) and data.format["type"] == "custom"
    if by_transform:
        cells: Any = [_cell(data, name, row) for row in range(len(data))]
    else:
        # A column of datasets that is read as a whole takes a tenth of the time.
        cells = data[name][:] if isinstance(data, Dataset) else data[name]
    try:
        values = np.asarray(cells)
    except ValueError:  # lists of unequal length
        values = None
    if values is not None and values.dtype.kind == "U" and not all(isinstance(cell, str) for cell in cells):
        values = np.array(list(cells), dtype=object)  # numpy makes strings of numbers beside strings
    if values is None or values.ndim != 1:
        raise ValueError(f"column {name!r} of the {split} set holds lists, like {cells[0]!r}: give each row one value")
    return values


def read_class_names(data: Any, label_column: str) -> dict[int, str]:
    """Class names by id; empty if the column is not a `ClassLabel`, or the data set does not know them."""
    if isinstance(data, Examples):
        return dict(enumerate(data.class_names.get(label_column, ())))
    feature = (getattr(data, "features", None) or {}).get(label_column)
    return dict(enumerate(feature.names)) if isinstance(feature, ClassLabel) else {}


def _cell(data: Dataset, name: str, row: int) -> Any:
    """A value that a transform of the user gives or, for a row whose image is damaged, the one before the transform."""
    try:
        return data[row][name]
    except Exception as error:
        if name not in data.column_names or is_own_error(data, row, "", error):
            raise
        return data.with_format(None).select_columns([name])[row][name]
