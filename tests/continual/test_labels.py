"""Labels and classes of any type: class ids, or one line that says what to do."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.data_sets import BY_ID, BY_NAME, IMAGES, LABELS, NAMES, RIGHT, ROWS, class_stream, seen
from support.stream_data import CLASSES, birds, train_batches

from cl_prompts.continual import (
    split_classes,
)


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


def test_ids_and_seeds_below_zero() -> None:
    with pytest.raises(ValueError, match="classes=-3: give class ids"):
        split_classes(-3, 1)
    with pytest.raises(ValueError, match="seed=-1 must be a non-negative integer"):
        split_classes(4, 2, seed=-1)
