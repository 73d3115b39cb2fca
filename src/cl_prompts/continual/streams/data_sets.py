"""Data sets as users have them, as rows by number with columns by name."""

from __future__ import annotations

import os
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, IterableDataset, List, Value, concatenate_datasets
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from cl_prompts.runtime.images import array_to_rgb
from cl_prompts.runtime.text import short_repr


FILES = {"string", "large_string", "binary", "large_binary"}  # types of a column of paths, or of contents of files
SPLITS = {"train", "training", "test", "validation", "val", "unsupervised", "extra"}
# Attributes in which the data sets of torchvision and others keep the label of each row, or (file, label).
LABELS, FILES_WITH_LABELS = ("targets", "labels", "_labels"), ("samples", "imgs", "_samples")


class Examples:
    """Rows whose images are read on access, and whose other columns are in memory.

    Args:
        image_column: name of the column of images.
        read: row number -> image.
        columns: values of each row of the other columns, by name.
        class_names: names of the classes by id, for columns of class ids.
    """

    def __init__(
        self,
        image_column: str,
        read: Callable[[int], Any],
        columns: Mapping[str, Sequence[Any]],
        class_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.image_column, self.read = image_column, read
        self.columns, self.class_names = dict(columns), dict(class_names or {})

    @property
    def column_names(self) -> list[str]:
        """Names of all columns."""
        return [self.image_column, *self.columns]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: int | str) -> Any:
        """A row by its number, with its image, or a column without images by its name."""
        if isinstance(key, str):
            return self.columns[key]
        return {self.image_column: self.read(int(key)), **{name: values[key] for name, values in self.columns.items()}}


def as_rows(data: Any, image_column: str, label_column: str, split: str) -> Any:
    """A data set that gives rows by number and columns by name.

    Accepted are `datasets.Dataset`, pandas frames, dicts of columns, lists of dicts, lists of pairs (image, label), a pair
    (images, labels), and data sets of torch and torchvision, whose labels are taken from `targets` or the like where they
    have them. Images in memory may be given as PIL images, arrays, tensors, paths, or contents of files.

    Args:
        data: the data set. An object of another type is returned as it is.
        image_column: name of the column of images, which pairs get too.
        label_column: name of the column of labels, which pairs get too.
        split: name of the data set in messages, as "training" or "test".

    Raises:
        ValueError: `data` cannot be read by row number, is not one data set, or is empty.
    """
    if isinstance(data, Dataset):
        return _with_images(data, image_column)
    if hasattr(data, "column_names") and not isinstance(data, IterableDataset | Mapping):
        return data
    _refuse(data, split)
    if hasattr(data, "iloc") and hasattr(data, "columns"):  # a pandas frame
        repeated = sorted({str(name) for name in data.columns if list(data.columns).count(name) > 1})
        if repeated:
            raise ValueError(f"columns {repeated} of the {split} set are there twice: rename one of each")
        return _in_memory({str(name): data[name] for name in data.columns}, image_column, split)
    if isinstance(data, Mapping):
        return _in_memory(data, image_column, split)
    if isinstance(data, TorchDataset) or _gives_pairs(data):
        return _torch_rows(data, image_column, label_column, split)
    if isinstance(data, tuple) and len(data) == 2 and not isinstance(data[0], tuple | Mapping):
        return _in_memory({image_column: data[0], label_column: data[1]}, image_column, split)
    if isinstance(data, list | tuple):
        if not data:
            raise ValueError(f"the {split} set is empty")
        if all(isinstance(row, Mapping) for row in data):
            names = list(dict.fromkeys(name for row in data for name in row))
            return _in_memory({name: [row.get(name) for row in data] for name in names}, image_column, split)
        wrong = [row for row in data if not (isinstance(row, tuple | list) and len(row) > 1)]
        if wrong:
            raise ValueError(
                f"the {split} set is a list with {_described(wrong[0])} in it: rows of a list are dicts, or pairs "
                "(image, label)"
            )
        images, labels = zip(*(row[:2] for row in data), strict=True)
        return _in_memory({image_column: images, label_column: labels}, image_column, split)
    return data


def concatenated(parts: Mapping[str, Any], image_column: str) -> Any:
    """The images of several data sets with rows by number, as one data set without other columns."""
    if all(isinstance(part, Dataset) for part in parts.values()):
        return concatenate_datasets([part.select_columns([image_column]) for part in parts.values()])
    sizes = [len(part) for part in parts.values()]
    read = partial(_cell_of_parts, list(parts.values()), [0, *accumulate(sizes)], image_column)
    return Examples(image_column, read, {"row": range(sum(sizes))})


def is_missing(value: Any) -> bool:
    """Whether a cell has no value: None, NaN, or NA of pandas."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return False
    try:
        return value is None or bool(value != value)
    except TypeError:  # comparisons with pandas.NA have no truth value
        return True


def holds_files(feature: Any) -> bool:
    """Whether a column holds images: decoded ones, or `{bytes, path}` as files of images are stored."""
    return isinstance(feature, Image) or (isinstance(feature, dict) and feature.keys() == {"bytes", "path"})


def _holds_pixels(feature: Any) -> bool:
    """Whether a column holds images as lists of bytes, as arrays become in `Dataset.from_dict`."""
    depth = 0
    while isinstance(feature, List):
        feature, depth = feature.feature, depth + 1
    return depth in (2, 3) and isinstance(feature, Value) and feature.dtype == "uint8"


def with_image_column(data: Any, image_column: str) -> Any:
    """A data set of `datasets` whose column of paths, contents of files, `{bytes, path}` or bytes is an image column."""
    feature = (data.features or {}).get(image_column)
    files = isinstance(feature, Value) and feature.dtype in FILES
    if isinstance(feature, Image) or not (files or holds_files(feature) or _holds_pixels(feature)):
        return data
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Downcasting array dtype")  # of pixels, which are bytes already
        return data.cast_column(image_column, Image())


def is_own_error(data: Any, row: int, image_column: str, error: BaseException) -> bool:
    """Whether an error in reading the image of a row comes from code of the user, not from an image that is damaged."""
    if isinstance(data, Dataset) and data.format["type"] == "custom":
        try:
            for cell in _with_images(data.with_format(None), image_column)[row].values():
                if hasattr(cell, "load"):
                    cell.load()
        except Exception:  # decoders raise nearly every kind of exception
            return False
        return True
    if not isinstance(data, Examples):
        return False
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__)]
    in_decoder = modules[-1].partition(".")[0] in ("PIL", "datasets", "torchvision")
    in_transform = any(name.startswith("torchvision.transforms") for name in modules)
    return not isinstance(error, OSError) and (in_transform or not in_decoder)


# ---- what is refused -----------------------------------------------------------------------------------------------------


def _refuse(data: Any, split: str) -> None:
    """Raise ValueError for what is no data set with rows, but may be taken for one."""
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"the {split} set is an IterableDataset, which has no rows by number: use IterableClassIncrementalStream or "
            "IterableDomainIncrementalStream, or load it without streaming=True"
        )
    if isinstance(data, Mapping) and data and all(isinstance(part, Dataset | IterableDataset) for part in data.values()):
        raise ValueError(f"the {split} set has the splits {list(data)}: pass one of them, data[{next(iter(data))!r}]")
    kind = type(data).__name__
    if isinstance(data, TorchDataset) and not hasattr(data, "__len__"):
        raise ValueError(f"the {split} set, a {kind}, has no __len__: give it one, which returns the number of rows")
    if isinstance(data, DataLoader):
        raise ValueError(f"the {split} set is a {kind}: pass its data set, loader.dataset; streams make their own batches")
    if isinstance(data, torch.utils.data.IterableDataset | Iterator):
        raise ValueError(
            f"the {split} set is a {kind}, which has no rows by number: pass list(data), or "
            "datasets.Dataset.from_generator(function)"
        )
    if isinstance(data, str | bytes | os.PathLike):
        raise ValueError(
            f"the {split} set is {short_repr(data)}, no data set: load it, with datasets.load_dataset(name, split=...) or "
            'datasets.load_dataset("imagefolder", data_dir=folder, split="train")'
        )
    frame = hasattr(data, "iloc") and hasattr(data, "columns")
    if (hasattr(data, "__array__") and not frame) or not hasattr(data, "__getitem__"):
        raise ValueError(
            f"the {split} set is of type {kind}: pass a datasets.Dataset, a data set of torchvision, a pandas frame, a "
            "dict of columns, a list of dicts, or (images, labels)"
        )


# ---- in memory -----------------------------------------------------------------------------------------------------------


def _in_memory(columns: Mapping[Any, Any], image_column: str, split: str) -> Any:
    """Columns of equal length as a data set."""
    # A series of pandas gives rows by their names, not by their numbers.
    columns = {name: values.tolist() if hasattr(values, "iloc") else values for name, values in columns.items()}
    sizes = {str(name): len(values) for name, values in columns.items()}
    if not sizes or not all(sizes.values()):
        raise ValueError(f"the {split} set is empty")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the columns of the {split} set have different lengths, {sizes}")
    others = {str(name): values for name, values in columns.items() if name != image_column}
    if image_column not in columns or not others:
        what = f"no column {image_column!r}" if image_column not in columns else "no column of labels"
        raise ValueError(
            f"the {split} set has {what}, its columns are {sorted(sizes)}: choose with image_column= and label_column="
        )
    return Examples(image_column, partial(_cell, columns[image_column]), others)


def _cell(images: Any, row: int) -> Any:
    """The image of a row, as `image_column.decode_cell` takes it; an array is made an RGB image."""
    cell = images[row]
    if isinstance(cell, str | os.PathLike):
        return {"bytes": None, "path": os.fspath(cell)}
    if isinstance(cell, list | tuple):  # lists of pixels
        cell = np.asarray(cell)
    if isinstance(cell, np.ndarray):
        return array_to_rgb(cell)
    return None if is_missing(cell) else cell


def _cell_of_parts(parts: list[Any], starts: list[int], image_column: str, row: int) -> Any:
    part = bisect_right(starts, row) - 1
    return parts[part][row - starts[part]][image_column]


def _with_images(data: Dataset, image_column: str) -> Dataset:
    # A transform of the user expects the column as it is.
    return data if data.format["type"] == "custom" else with_image_column(data, image_column)


# ---- torch ---------------------------------------------------------------------------------------------------------------


def _torch_rows(data: Any, image_column: str, label_column: str, split: str) -> Any:
    """A data set of torch whose items are pairs (image, label) or dicts."""
    if not len(data):
        raise ValueError(f"the {split} set is empty")
    first = data[0]
    keys = (image_column, label_column) if isinstance(first, Mapping) else (0, 1)
    is_pair = isinstance(first, tuple | list) and len(first) > 1
    if not is_pair and not (isinstance(first, Mapping) and first.keys() >= {*keys}):
        raise ValueError(
            f"an item of the {split} set is {_described(first)}: return a pair (image, label), or a dict with "
            f"{image_column!r} and {label_column!r}"
        )
    labels = _torch_labels(data, label_column)
    if labels is None:
        labels = [data[row][keys[1]] for row in range(len(data))]  # decodes every image: no other way to the labels
    names = {label_column: _torch_names(data, label_column)}
    return Examples(image_column, partial(_torch_image, data, keys[0]), {label_column: _plain(labels)}, names)


def _described(item: Any) -> str:
    return f"a dict with {sorted(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"


def _gives_pairs(data: Any) -> bool:
    """Whether an object of another class gives pairs by row number, as data sets of torch do."""
    rows = hasattr(data, "__len__") and not isinstance(data, list | tuple)
    return rows and len(data) > 0 and isinstance(data[0], tuple)


def _torch_image(data: Any, key: Any, row: int) -> Any:
    return data[row][key]


def _torch_labels(data: Any, label_column: str) -> Any:
    """The label of each row, if it is known without reading images."""
    if isinstance(data, Dataset):
        return data.with_format(None)[label_column][:] if data.format["type"] != "custom" else None
    if isinstance(data, Subset):
        of_all = _torch_labels(data.dataset, label_column)
        return None if of_all is None else [of_all[int(row)] for row in data.indices]
    if isinstance(data, ConcatDataset):
        parts = [_torch_labels(part, label_column) for part in data.datasets]
        return None if any(part is None for part in parts) else [label for part in parts for label in part]
    if isinstance(data, TensorDataset):
        return _plain(data.tensors[1])
    found = [getattr(data, name, None) for name in LABELS]
    found += [_second(getattr(data, name, None)) for name in FILES_WITH_LABELS]
    labels = next((_plain(values) for values in found if _are_labels(values, len(data))), None)
    change = getattr(data, "target_transform", None)
    return labels if labels is None or change is None else [change(label) for label in labels]


def _second(pairs: Any) -> Any:
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return None
    return [pair[1] for pair in pairs]


def _are_labels(values: Any, rows: int) -> bool:
    return hasattr(values, "__len__") and not isinstance(values, Mapping) and len(values) == rows


def _plain(values: Any) -> Any:
    # A label of several numbers, as one-hot labels are, is left to the error of `read_column`.
    return [value.item() if hasattr(value, "item") and np.size(value) == 1 else value for value in values]


def _torch_names(data: Any, label_column: str) -> list[str]:
    """Names of the classes, in the order of their ids; empty if unknown."""
    while isinstance(data, Subset | ConcatDataset):
        data = data.dataset if isinstance(data, Subset) else data.datasets[0]
    if isinstance(data, Dataset):
        return list(getattr(data.features.get(label_column), "names", ()))
    names = getattr(data, "classes", None)
    if not isinstance(names, list | tuple) or getattr(data, "target_transform", None) is not None:
        return []
    return list(names) if all(isinstance(name, str) for name in names) else []
