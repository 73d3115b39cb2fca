"""Data sets as users have them: each kind gives the right images and labels, or one line that says what to do."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value
from support.data_sets import (
    BY_ID,
    BY_NAME,
    IMAGES,
    LABELS,
    NAMES,
    RIGHT,
    Dicts,
    Folder,
    LikeTorchvision,
    NoTorch,
    Pairs,
    class_stream,
    forms_of_images,
    parquet,
    seen,
)
from support.stream_data import CLASSES, birds, to_tensor, train_batches
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from cl_prompts.continual import (
    DatasetSequenceStream,
    DomainIncrementalStream,
    GaussianStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
)


# ---- kinds of data sets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PIL", "paths", "names of files", "contents of files", "cells of parquet", "arrays"])
def test_rows_in_memory(form: str, tmp_path: Path) -> None:
    images = forms_of_images(tmp_path)[form]
    plain = [str(image) for image in images] if form == "paths" else images  # Arrow has no paths
    for data in (
        {"image": images, "label": LABELS},
        [{"image": image, "label": label} for image, label in zip(images, LABELS, strict=True)],
        list(zip(images, LABELS, strict=True)),
        (images, LABELS),
        pd.DataFrame({"image": images, "label": LABELS}),
        Dataset.from_dict({"image": plain, "label": LABELS}),
    ):
        assert seen(class_stream(data)) == RIGHT


@pytest.mark.parametrize(
    ("data", "tasks", "columns"),
    [
        (Pairs(), BY_ID, {}),
        (Pairs(NAMES), BY_NAME, {}),
        (LikeTorchvision(), BY_ID, {}),
        (LikeTorchvision(), BY_NAME, {}),
        (Folder(), BY_ID, {}),
        (Dicts(), BY_ID, {"image_column": "picture", "label_column": "kind"}),
        (NoTorch(), BY_ID, {}),
        (Subset(LikeTorchvision(), range(8)), BY_NAME, {}),
        (ConcatDataset([Subset(LikeTorchvision(), range(3)), Subset(LikeTorchvision(), range(3, 8))]), BY_NAME, {}),
    ],
)
def test_data_sets_of_torch(data: Any, tasks: Any, columns: dict[str, str]) -> None:
    assert seen(class_stream(data, tasks, **columns)) == RIGHT


def test_tensors() -> None:
    images = torch.stack([to_tensor(image) for image in IMAGES])
    for data in ((images, torch.tensor(LABELS)), TensorDataset(images, torch.tensor(LABELS))):
        assert seen(class_stream(data, transform=lambda image: image)) == RIGHT


@pytest.mark.parametrize("kind", [LikeTorchvision, Folder])
def test_known_labels_are_read_without_the_images(kind: type[Pairs]) -> None:
    data = kind()
    class_stream(data)
    assert set(data.read) == {0}, "the first item tells pairs from dicts"


def test_a_transform_that_makes_the_columns() -> None:
    def prepared(rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {"pixel_values": [to_tensor(image) for image in rows["image"]], "labels": rows["label"]}

    data = birds(LABELS).with_transform(prepared)
    stream = class_stream(data, transform=lambda image: image, image_column="pixel_values", label_column="labels")
    assert seen(stream) == RIGHT


def test_rows_of_pandas_are_taken_by_number() -> None:
    """The names of rows of a shuffled frame were taken for their numbers: images got labels of others."""
    mixed = pd.DataFrame({"image": IMAGES, "label": LABELS}).sample(frac=1, random_state=0)
    for data in (mixed, (mixed["image"], mixed["label"]), {"image": mixed["image"], "label": mixed["label"]}):
        assert seen(class_stream(data)) == RIGHT


def test_parts_of_data_sets_of_datasets() -> None:
    """Their labels and names are known without reading images."""
    data = Subset(birds(LABELS, bad=(3,)), [0, 1, 2, 3, 4, 5, 6, 7])
    assert class_stream(data, BY_NAME).names == dict(enumerate(CLASSES))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_transform_of_the_data_set_and_a_damaged_image(policy: str) -> None:
    """Labels are read through the transform, which decodes the images."""
    data = birds(LABELS, bad=(2,)).with_transform(
        lambda rows: {"image": [to_tensor(image) for image in rows["image"]], "label": rows["label"]}
    )
    stream = class_stream(data, transform=lambda image: image, on_bad_image=policy)
    if policy == "stop":
        with pytest.raises(ValueError, match=r"the image of train row 2 cannot be read .*on_bad_image='skip'"):
            list(stream.train_batches(stream.tasks[1], 8, seed=0, epoch=0))
    else:
        (batch,) = stream.train_batches(stream.tasks[1], 8, seed=0, epoch=0)
        assert sorted(batch["labels"].tolist()) == [-100, 2, 3, 3]

    def broken(rows: Any) -> Any:
        raise OSError("the user's own disk")

    with pytest.raises(OSError, match="the user's own disk"):
        class_stream(data.with_transform(broken), on_bad_image=policy)


class NoLength(torch.utils.data.Dataset[Any]):
    def __getitem__(self, row: int) -> Any:
        return IMAGES[row], LABELS[row]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (NoLength(), "the training set, a NoLength, has no __len__: give it one"),
        (
            pd.DataFrame([[1, 2, 3]], columns=["image", "label", "label"]),
            r"columns \['label'\] of the training set are there twice",
        ),
        (
            {"image": IMAGES, "label": pd.array([None, *LABELS[1:]], dtype="Int64")},
            "holds (nan|<NA>) in row 0.*leave",
        ),
        (
            {"image": IMAGES, "label": pd.array([None, *NAMES[1:]], dtype="string")},
            "holds (nan|<NA>) in row 0.*leave",
        ),
        ({"image": IMAGES, "label": [2**70, *LABELS[1:]]}, f"holds {2**70} in row 0, which is no class id"),
        ({"image": IMAGES, "label": [0, *NAMES[1:]]}, "holds 0 in row 0, .*other rows hold names, like 'jay'"),
        (Pairs(list(torch.eye(8))), "holds lists, like"),
        ([], "the training set is empty"),
        ({"image": [], "label": []}, "the training set is empty"),
        (Pairs([]), "the training set is empty"),
        (birds([]), "the training set is empty"),
        (
            {"image": IMAGES, "label": [0]},
            r"columns of the training set have different lengths, \{'image': 8, 'label': 1\}",
        ),
        (
            {"img": IMAGES, "label": LABELS},
            r"no column 'image', its columns are \['img', 'label'\]: choose with image_column=",
        ),
        (
            {"image": IMAGES, "fine": LABELS},
            r"no column 'label', its columns are \['fine', 'image'\]: choose with image_col",
        ),
        (birds(LABELS).rename_column("label", "fine"), "no column 'label'.*: choose with image_column= and label_column="),
        (
            DatasetDict(train=birds(LABELS)),
            r"the training set has the splits \['train'\]: pass one of them, data\['train'\]",
        ),
        (birds(LABELS).to_iterable_dataset(), "is an IterableDataset.*: use IterableClassIncrementalStream"),
        ((row for row in [IMAGES]), r"is a generator, which has no rows by number: pass list\(data\)"),
        (DataLoader(Pairs()), r"is a DataLoader: pass its data set, loader\.dataset"),
        ("cifar100", r"is 'cifar100', no data set: load it, with datasets\.load_dataset"),
        (Path("images"), r"is PosixPath\('images'\), no data set: load it"),
        (IMAGES[0], "is of type Image: pass a datasets.Dataset"),
        (np.zeros((8, 3)), "is of type ndarray: pass"),
        (None, "is of type NoneType: pass"),
        (IMAGES, r"is a list with a Image in it: rows of a list are dicts, or pairs \(image, label\)"),
        (Dicts(), r"an item of the training set is a dict with \['kind', 'picture'\]: return a pair \(image, label\)"),
    ],
)
def test_what_is_no_data_set(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        class_stream(data)
    assert "\n" not in str(raised.value)


# ---- other scenarios -------------------------------------------------------------------------------------------------


FRAME = pd.DataFrame({"image": IMAGES, "label": NAMES})


def test_domains_of_any_kind() -> None:
    sets = {"photo": FRAME, "sketch": {"image": IMAGES, "label": NAMES}}
    column = {"image": IMAGES * 2, "label": NAMES * 2, "domain": ["photo"] * 8 + ["sketch"] * 8}
    everything = sorted(RIGHT[0] + RIGHT[1])
    for train, test, more in ((sets, sets, {}), (column, column, {}), (sets, FRAME, {"common_test": True})):
        stream = DomainIncrementalStream(train, test, to_tensor, **more)
        assert [task.name for task in stream] == ["photo", "sketch"]
        assert seen(stream) == [everything, everything]
    with pytest.raises(
        ValueError, match=r"has the splits \['train', 'test'\], which are no domains: pass one, data\['train'\]"
    ):
        DomainIncrementalStream({"train": birds(LABELS), "test": birds(LABELS)}, birds(LABELS), to_tensor)


def test_sequences_and_schedules_of_any_kind() -> None:
    sets = {"a": FRAME, "b": LikeTorchvision()}
    sequence = DatasetSequenceStream(sets, sets, to_tensor)
    assert sequence.names == {i: f"a/{name}" for i, name in enumerate(sorted(CLASSES))} | {
        i + 4: f"b/{name}" for i, name in enumerate(CLASSES)
    }
    assert len(seen(sequence)[1]) == 8
    gaussian = GaussianStream(FRAME, FRAME, to_tensor, classes=["owl", "jay"])
    assert seen(gaussian) == [RIGHT[0]]


# ---- in order --------------------------------------------------------------------------------------------------------


def test_parquet_without_a_header(tmp_path: Path) -> None:
    assert seen(class_stream(parquet(tmp_path, NAMES, streaming=False), BY_NAME)) == RIGHT
    assert seen(class_stream(parquet(tmp_path, LABELS, streaming=False), BY_ID)) == RIGHT


@pytest.mark.parametrize(
    ("labels", "tasks"),
    [(LABELS, BY_ID), (NAMES, BY_NAME), ([str(label) for label in LABELS], BY_ID), ([float(c) for c in LABELS], BY_ID)],
)
def test_labels_read_in_order(labels: list[Any], tasks: Any, tmp_path: Path) -> None:
    train = parquet(tmp_path, labels)
    for test in (train, {"image": IMAGES, "label": labels}):
        assert seen(IterableClassIncrementalStream(train, test, tasks, to_tensor)) == RIGHT


def test_domains_in_order_by_class_names(tmp_path: Path) -> None:
    sets = {"photo": parquet(tmp_path, NAMES)}
    stream = IterableDomainIncrementalStream(sets, {"photo": FRAME}, CLASSES, to_tensor)
    assert seen(stream) == [sorted(RIGHT[0] + RIGHT[1])]


@pytest.mark.parametrize("path", [None, float("nan"), pd.NA])
def test_a_path_that_is_missing(path: Any, tmp_path: Path) -> None:
    files = [str(file) for file in forms_of_images(tmp_path)["paths"]]
    stream = class_stream(pd.DataFrame({"image": [path, *files[1:]], "label": LABELS}))
    with pytest.raises(ValueError, match=r"train row 0 cannot be read \(the cell is empty\)"):
        seen(stream)


def test_pixels_in_lists_have_no_known_range() -> None:
    with pytest.raises(ValueError, match=r"pixels of unknown range: cast it to uint8"):
        seen(class_stream({"image": [np.asarray(image).tolist() for image in IMAGES], "label": LABELS}))


@pytest.mark.parametrize(
    ("labels", "tasks", "message"),
    [
        (LABELS, BY_NAME, "task 0 names 'owl', which is no class id: .* names are not known"),
        ([float("nan"), *map(float, LABELS[1:])], BY_ID, "a label of the training set is None: class ids start at 0"),
        ([0.5, *map(float, LABELS[1:])], BY_ID, "a label of the training set is 0.5: class ids start at 0 and are whole"),
        ([[label] for label in LABELS], BY_ID, r"a label of the training set is \[0\]: class ids"),
        (NAMES, [["owl", "jayy"], ["wren", "crow"]], r"gave no images of classes \['jayy'\]: spell them alike"),
        (NAMES, BY_ID, "column 'label' of the training set holds names, like 'owl': give the classes of the tasks by name"),
        ([-1, *LABELS[1:]], BY_ID, "a label of the training set is -1: class ids start at 0"),
        ([None, *LABELS[1:]], BY_ID, "a label of the training set is None"),
        (LABELS, [[-1, 0]], "task 0 names -1: class ids start at 0"),
    ],
)
def test_labels_in_order_that_are_no_classes(labels: list[Any], tasks: Any, message: str, tmp_path: Path) -> None:
    data = parquet(tmp_path, labels)
    with pytest.raises(ValueError, match=message):
        list(train_batches(IterableClassIncrementalStream(data, data, tasks, to_tensor)))


def test_what_cannot_be_read_in_order() -> None:
    unknown = IterableDataset.from_generator(lambda: iter([{"image": IMAGES[0], "label": 0}]))
    for data, message in (
        (unknown, r"does not know the types of its columns: pass features= .*Features\(\{'image': Image\(\), \.\.\.\}\)"),
        (DatasetDict(train=birds(LABELS)), r"has the splits \['train'\]: pass one of them, data\['train'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            IterableClassIncrementalStream(data, data, BY_ID, to_tensor)
    features = Features({"image": Image(), "label": Value("int64")})
    known = IterableDataset.from_generator(lambda: iter([{"image": IMAGES[0], "label": 0}]), features=features)
    assert next(iter(train_batches(IterableClassIncrementalStream(known, known, [[0]], to_tensor))))["labels"] == 0
