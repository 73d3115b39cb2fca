"""Data sets as users have them: each kind gives the right images and labels, or one line that says what to do."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage
from support.stream_data import CLASSES, birds, encoded, pictures, to_tensor, train_batches
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from transformers import ViTImageProcessor

from cl_prompts.continual import (
    ClassIncrementalStream,
    DatasetSequenceStream,
    DomainIncrementalStream,
    GaussianStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
    Stream,
    split_classes,
)
from cl_prompts.interfaces import IGNORE_INDEX


LABELS = [0, 1, 2, 3] * 2
IMAGES = pictures(8)
NAMES = [CLASSES[label] for label in LABELS]
BY_ID, BY_NAME = [[0, 1], [2, 3]], [["owl", "jay"], ["wren", "crow"]]
ROWS = {"image": IMAGES, "label": LABELS}


def class_stream(data: Any, tasks: Any = BY_ID, transform: Any = to_tensor, test: Any = None, **more: Any) -> Stream:
    return ClassIncrementalStream(data, data if test is None else test, tasks, transform, **more)


def seen(stream: Stream) -> list[list[tuple[str, float]]]:
    """Of each task, the class and the first pixel of each training image."""
    tasks = []
    for task in stream.tasks:
        (batch,) = train_batches(stream, task.number, 8)
        assert len(next(iter(stream.test_batches(task, 8)))["labels"])
        assert batch["labels"].dtype == torch.int64
        names = [stream.names[c] if stream.names else CLASSES[c] for c in batch["labels"].tolist()]
        tasks.append(sorted(zip(names, batch["pixel_values"][:, 0, 0, 0].tolist(), strict=True)))
    return tasks


RIGHT = [sorted((NAMES[i], to_tensor(IMAGES[i])[0, 0, 0].item()) for i in range(8) if NAMES[i] in task) for task in BY_NAME]


class Pairs(torch.utils.data.Dataset[Any]):
    """As a data set of torch, whose labels are known from its items only."""

    def __init__(self, labels: Any = LABELS, transform: Callable[[Any], Any] | None = None) -> None:
        self.known, self.transform, self.read = labels, transform, list[int]()

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, row: int) -> Any:
        self.read.append(row)
        return IMAGES[row] if self.transform is None else self.transform(IMAGES[row]), self.known[row]


class LikeTorchvision(Pairs):
    """As torchvision's: labels in `targets`, names in `classes`."""

    classes = tuple(CLASSES)

    @property
    def targets(self) -> Any:
        return torch.tensor(self.known)


class Folder(Pairs):
    """As torchvision's `DatasetFolder` of old versions: (file, label) in `samples`."""

    @property
    def samples(self) -> list[tuple[str, int]]:
        return [(f"{row}.png", label) for row, label in enumerate(self.known)]


class Dicts(Pairs):
    def __getitem__(self, row: int) -> dict[str, Any]:
        image, label = super().__getitem__(row)
        return {"picture": image, "kind": label}


class NoTorch:
    """Pairs by number, without a base class."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> Any:
        return IMAGES[row], LABELS[row]


# ---- kinds of data sets ----------------------------------------------------------------------------------------------


def forms_of_images(folder: Path) -> dict[str, list[Any]]:
    for number, image in enumerate(IMAGES):
        image.save(folder / f"{number}.png")
    paths = [folder / f"{number}.png" for number in range(8)]
    return {
        "PIL": IMAGES,
        "paths": paths,
        "names of files": [str(path) for path in paths],
        "contents of files": [path.read_bytes() for path in paths],
        "cells of parquet": [encoded(image) for image in IMAGES],
        "arrays": [np.asarray(image) for image in IMAGES],
    }


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


@pytest.mark.parametrize(
    ("data", "message"),
    [
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


# ---- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [float(label) for label in LABELS],
        [torch.tensor(label) for label in LABELS],
        [np.int32(label) for label in LABELS],
        torch.tensor(LABELS),
        pd.Series(LABELS),
        [str(label) for label in LABELS],
        NAMES,
        np.array(NAMES),
    ],
)
def test_labels_of_any_type(labels: Any) -> None:
    named = isinstance(labels[0], str) and not labels[0].isdecimal()
    for data in ({"image": IMAGES, "label": labels}, pd.DataFrame({"image": IMAGES, "label": list(labels)})):
        assert seen(class_stream(data, BY_NAME if named else BY_ID)) == RIGHT


def test_labels_that_are_true_or_false() -> None:
    stream = class_stream({"image": IMAGES, "label": [bool(label % 2) for label in LABELS]}, [[1], [0]])
    assert [task.train_rows.tolist() for task in stream.tasks] == [[1, 3, 5, 7], [0, 2, 4, 6]]
    assert train_batches(stream).__iter__().__next__()["labels"].tolist() == [1] * 4


def test_numbers_in_strings_are_class_ids() -> None:
    """ "10" is class 10, not the second of three names."""
    data = {"image": IMAGES[:3], "label": ["9", "10", "2"]}
    stream = class_stream(data, [[2], [9, 10]])
    assert [task.train_rows.tolist() for task in stream.tasks] == [[2], [0, 1]]
    assert stream.names == {}


def test_names_in_train_and_test() -> None:
    """Train and test have one numbering, also if one knows its names as ClassLabel."""
    names = {"image": IMAGES, "label": NAMES}
    for train, test in ((names, birds(LABELS)), (birds(LABELS), names)):
        assert seen(class_stream(train, BY_NAME, test=test)) == RIGHT
    for train, test, message in (
        (names, {"image": IMAGES[:1], "label": ["emu"]}, r"test images are of classes \['emu'\], which no training image"),
        (names, ROWS, "training labels are names, like 'crow', and test labels are not"),
        (ROWS, names, "column 'label' of the test set holds 'owl' in row 0, which is no class id"),
        (birds(LABELS), birds(LABELS, names=CLASSES[::-1]), "different class names for one id"),
    ):
        with pytest.raises(ValueError, match=message):
            class_stream(train, BY_ID, test=test)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [None, *LABELS[1:]],
            r"holds None in row 0, which is no class id: leave such rows out, for example with data\.filter",
        ),
        ([None, *NAMES[1:]], "holds None in row 0, which is no class id: leave such rows out"),
        ([float("nan"), *LABELS[1:]], "holds nan in row 0, which is no class id: leave such rows out"),
        ([0.5, *LABELS[1:]], r"holds 0\.5 in row 0, which is no class id: encode the classes"),
        (["owl", *LABELS[1:]], "holds 1 in row 1, which is no class id"),
        ([-1, *LABELS[1:]], r"the label of training row 0 is -1: class ids start at 0 \(-100 marks padding\)"),
        ([[0, 1]] * 8, r"holds lists, like \[0, 1\]: give each row one value"),
    ],
)
def test_labels_that_are_no_classes(labels: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_stream({"image": IMAGES, "label": labels})


@pytest.mark.parametrize(
    ("data", "tasks", "message"),
    [
        (birds(LABELS), [["emu"]], r"task 0 names 'emu', which is no class id: the class names are \['owl', 'jay'"),
        (ROWS, BY_NAME, "task 0 names 'owl', which is no class id: class ids are integers, and names are not known"),
        (birds(LABELS), ["owl"], "task 0 is 'owl': give a list of class ids for each task"),
        (ROWS, [[-1, 0]], r"task 0 names -1: class ids start at 0"),
    ],
)
def test_tasks_that_name_no_class(data: Any, tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_stream(data, tasks)


@pytest.mark.parametrize(
    ("classes", "tasks", "split"),
    [
        (["cat", "dog"], 2, [["cat"], ["dog"]]),
        (10, 2, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (np.int64(4), np.int64(2), BY_ID),
        (LABELS, 2, BY_ID),
        (birds(LABELS)["label"], 2, BY_ID),
        (birds(LABELS).features["label"], 2, BY_ID),
        (torch.tensor(LABELS), 2, BY_ID),
        (NAMES, [1, 3], [["crow"], ["jay", "owl", "wren"]]),
        (["10", "9", "2"], 3, [[2], [9], [10]]),
        ([1.0, 0.0], 2, [[0], [1]]),
    ],
)
def test_classes_to_split(classes: Any, tasks: Any, split: Any) -> None:
    assert split_classes(classes, tasks) == split


@pytest.mark.parametrize(
    ("classes", "tasks", "message"),
    [
        ([0, "cat"], 2, "classes name 0: give class ids, or class names only"),
        ([0.5], 1, r"classes name 0\.5: give class ids"),
        ([None, 1], 1, "classes name None: give class ids"),
        ("cat", 1, "classes='cat': give class ids, class names, or the number of classes"),
        (None, 1, "classes=None: give class ids"),
        (4, "2", "4 classes cannot be split into tasks of '2'"),
        (4, None, "4 classes cannot be split into tasks of None"),
        (4, True, "4 classes cannot be split into True tasks"),
    ],
)
def test_what_cannot_be_split(classes: Any, tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_classes(classes, tasks)


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


def parquet(folder: Path, labels: list[Any], *, streaming: bool = True) -> Any:
    """As pandas and Spark write it: no header tells that a column of `{bytes, path}` holds images."""
    file = folder / "images.parquet"
    pd.DataFrame({"image": [encoded(image) for image in IMAGES], "label": labels}).to_parquet(file)
    return load_dataset(
        "parquet", data_files=str(file), split="train", streaming=streaming, cache_dir=str(folder / "cache")
    )


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


@pytest.mark.parametrize(
    ("labels", "tasks", "message"),
    [
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


# ---- transforms ------------------------------------------------------------------------------------------------------


PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


class WithImageProcessor:
    """As the processors of models for images and text are."""

    image_processor = PROCESSOR


@pytest.mark.parametrize(
    "transform",
    [
        PROCESSOR,
        WithImageProcessor(),
        lambda image: PROCESSOR(image),
        lambda image: PROCESSOR(image, return_tensors="pt"),
        lambda image: PROCESSOR(image, return_tensors="np")["pixel_values"],
        lambda image: PROCESSOR(image, return_tensors="np")["pixel_values"][0].astype(np.float64),
    ],
)
def test_an_image_processor_as_transform(transform: Any) -> None:
    stream = class_stream(birds(LABELS), transform=transform)
    pixels = stream.pixels(IMAGES[0])
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, PROCESSOR(IMAGES[0], return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, r"transform=None: pass a function image -> tensor \[3, H, W\], or the base's image processor"),
        ("google/vit", "transform='google/vit': pass a function"),
        (ViTImageProcessor, "transform=<class .*: pass a function"),
    ],
)
def test_what_is_no_transform(transform: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        class_stream(birds(LABELS), transform=transform)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, r"the transform returned a \w+: end it with ToTensor\(\)"),
        (lambda image: None, "the transform returned a NoneType"),
        (lambda image: {"image": image}, r"the transform returned a dict with \['image'\]"),
        (
            lambda image: np.asarray(image) / 255,
            r"returned shape \[6, 9, 3\], expected .*: permute\(2, 0, 1\) puts the chan",
        ),
        (
            lambda image: torch.zeros(2, 3, 8, 8),
            r"returned shape \[2, 3, 8, 8\], expected \[3, height, width\]: return one",
        ),
        (lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8), r"returned torch\.uint8: convert to float and normalize"),
        (
            lambda image: torch.zeros(3, 8, 1 + np.asarray(image)[0, 0, 0] % 7),
            "images of sizes .*: let it resize all to one",
        ),
    ],
)
def test_what_is_no_image(transform: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        list(train_batches(class_stream(birds(LABELS), transform=transform)))


# ---- errors of the user's own code -----------------------------------------------------------------------------------


def fails_for_jays(rows: Any) -> Any:
    """A transform of a data set with a bug that one class shows."""
    images = [undefined_name(i) if c == 1 else i for i, c in zip(rows["image"], rows["label"], strict=True)]  # type: ignore[name-defined]  # noqa: F821
    return {"image": images, "label": rows["label"]}


def fails_for_the_second(image: PILImage.Image) -> Any:
    return undefined_name(image) if image is IMAGES[1] else image  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("on_bad_image", ["skip", "stop"])
@pytest.mark.parametrize("kind", ["datasets", "torch", "stream"])
def test_a_bug_in_a_transform_is_no_bad_image(kind: str, on_bad_image: str) -> None:
    """Under "skip" it would drop a whole class without a word."""
    data: Any = birds(LABELS).with_transform(fails_for_jays) if kind == "datasets" else birds(LABELS)
    if kind == "torch":
        data = LikeTorchvision(transform=fails_for_the_second)
    transform: Any = (lambda image: undefined_name(image)) if kind == "stream" else to_tensor  # type: ignore[name-defined]  # noqa: F821
    # Labels are known without the transform, as in a data set that is opened by others.
    stream = class_stream(birds(LABELS), transform=transform, on_bad_image=on_bad_image)
    assert isinstance(stream, ClassIncrementalStream)
    stream.train = class_stream(data, on_bad_image=on_bad_image).train if kind == "torch" else data
    with pytest.raises(NameError, match="undefined_name"):
        list(train_batches(stream))


def test_a_bad_image_under_a_transform_of_the_data_set_is_still_skipped() -> None:
    def copied(rows: Any) -> Any:
        return {"image": [image.copy() for image in rows["image"]], "label": rows["label"]}

    stream = class_stream(birds(LABELS), on_bad_image="skip")
    assert isinstance(stream, ClassIncrementalStream)
    stream.train = birds(LABELS, bad=(1,)).with_transform(copied)
    (batch,) = train_batches(stream)
    assert sorted(batch["labels"].tolist()) == [IGNORE_INDEX, 0, 0, 1]
    assert stream.skipped["train"] == [1]


def test_a_file_that_is_not_there_is_a_bad_image(tmp_path: Path) -> None:
    paths = [tmp_path / "gone.png", *forms_of_images(tmp_path)["paths"][1:]]
    stream = class_stream((paths, LABELS), on_bad_image="skip")
    (batch,) = train_batches(stream)
    assert sorted(batch["labels"].tolist()) == [IGNORE_INDEX, 0, 1, 1]
    with pytest.raises(ValueError, match=r"train row 0 cannot be read \(there is no such file"):
        list(train_batches(class_stream((paths, LABELS))))
