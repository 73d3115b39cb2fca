"""Which images a task of each scenario has, and what a scenario refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stream_data import CLASSES, birds, number_to_tensor, row_values, to_tensor

from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    DatasetSequenceStream,
    DomainIncrementalStream,
    GaussianStream,
    split_classes,
)


LABELS = [0, 1, 2, 3] * 6
DOMAIN = [0] * 8 + [2] * 8 + [1] * 8


def rows_by_hand(wanted: Any, *columns: list[int]) -> list[int]:
    return [row for row, values in enumerate(zip(*columns, strict=True)) if wanted(*values)]


# ---- new classes ---------------------------------------------------------------------------------------------------


def test_unequal_tasks() -> None:
    assert split_classes([4, 2, 0, 1, 3], [1, 3, 1]) == [[0], [1, 2, 3], [4]]
    seeded = split_classes(range(20), [15, 5], seed=3)
    assert [len(part) for part in seeded] == [15, 5]
    assert [c for part in seeded for c in part] == [c for part in split_classes(range(20), 4, seed=3) for c in part]
    for sizes in ([2, 2], [5, 0], [], [6, -1]):
        with pytest.raises(ValueError, match=r"5 classes cannot be split into tasks of \["):
            split_classes(range(5), sizes)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 6), max_size=4), max_size=4))
def test_tasks_are_taken_or_refused_with_a_reason(tasks: list[list[int]]) -> None:
    """Never a stream with an empty task, an unknown class or one class in two tasks."""
    data = row_values([0, 1, 2, 3, 4])
    named = [c for task in tasks for c in task]
    fine = tasks and all(tasks) and len(set(named)) == len(named) and set(named) <= set(range(5))
    if fine:
        stream = ClassIncrementalStream(data, data, tasks, number_to_tensor)
        assert [task.classes for task in stream] == tasks
        assert stream.classes == named
    else:
        why = "no classes|twice|repeats classes|no training images|at least one task"
        with pytest.raises(ValueError, match=why):
            ClassIncrementalStream(data, data, tasks, number_to_tensor)


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        ([0, 1, -1], [0, 1], "the label of training row 2 is -1: class ids start at 0"),
        ([0, 1, 1], [0, 1, 7], r"test images are of classes \[7\], which no training image has"),
        ([], [0], "the training set is empty"),
    ],
)
def test_labels_that_are_none(train: list[int], test: list[int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ClassIncrementalStream(row_values(train), row_values(test), [[0], [1]], number_to_tensor)


def test_columns_that_are_missing_or_of_another_kind() -> None:
    data = row_values([0, 1])
    with pytest.raises(ValueError, match=r"the training set has no column 'img', only \['image', 'label'\]"):
        ClassIncrementalStream(data, data, [[0], [1]], number_to_tensor, image_column="img")
    with pytest.raises(ValueError, match="the training set has no column 'fine'"):
        ClassIncrementalStream(data, data, [[0], [1]], number_to_tensor, label_column="fine")
    words = Dataset.from_dict({"image": [0, 1], "label": ["owl", "jay"]})
    with pytest.raises(ValueError, match=r"column 'label' of the training set holds 'owl' in row 0, which is no class id"):
        ClassIncrementalStream(words, words, [[0], [1]], number_to_tensor)
    with pytest.raises(ValueError, match=r"the training set is an IterableDataset.*IterableClassIncrementalStream"):
        ClassIncrementalStream(data.to_iterable_dataset(), data, [[0], [1]], number_to_tensor)
    with pytest.raises(ValueError, match=r"on_bad_image='ignore': choose one of \['stop', 'skip'\]"):
        ClassIncrementalStream(data, data, [[0], [1]], number_to_tensor, on_bad_image="ignore")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([0, 1, None, 1], "holds None in row 2, which is no class id"),
        ([0.0, float("nan"), 1.0], "holds nan in row 1, which is no class id"),
        ([[0], [1], [0]], r"holds lists, like \[0\]: give each row one value"),
        ([[0, 1], [1], [0]], r"holds lists, like \[0, 1\]: give each row one value"),
    ],
)
def test_a_label_that_is_no_class_id_is_named(labels: list[Any], why: str) -> None:
    data = Dataset.from_dict({"image": list(range(len(labels))), "label": labels})
    with pytest.raises(ValueError, match=f"column 'label' of the training set {why}"):
        ClassIncrementalStream(data, data, [[0], [1]], number_to_tensor)


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        (2, r"tasks=2: give the class ids of each task \(split_classes"),
        ([0, 1], "task 0 is 0: give a list of class ids for each task"),
        ([[0], ["owl"]], "task 1 names 'owl', which is no class id"),
        (["01"], "task 0 names '0', which is no class id"),
        ([[0, 1.5]], r"task 0 names 1\.5, which is no class id"),
    ],
)
def test_tasks_that_are_no_lists_of_class_ids(tasks: Any, why: str) -> None:
    data = row_values([0, 1])
    with pytest.raises(ValueError, match=why):
        ClassIncrementalStream(data, data, tasks, number_to_tensor)


def test_tasks_as_arrays() -> None:
    data = row_values([0, 1, 2, 3])
    for tasks in (np.array([[0, 3], [1, 2]]), torch.tensor([[0, 3], [1, 2]])):
        stream = ClassIncrementalStream(data, data, tasks, number_to_tensor)
        assert [task.classes for task in stream] == [[0, 3], [1, 2]]


def test_class_names() -> None:
    stream = ClassIncrementalStream(birds(LABELS), birds(LABELS), [[2, 0], [1, 3]], to_tensor)
    assert stream.class_names([3, 0]) == {3: "crow", 0: "owl"}
    assert ClassIncrementalStream(row_values([0]), row_values([0]), [[0]], number_to_tensor).class_names([0]) == {}


# ---- new domains ---------------------------------------------------------------------------------------------------


def test_domains_by_column() -> None:
    data = birds(LABELS, domains=DOMAIN)
    stream = DomainIncrementalStream(data, data, to_tensor)
    assert [(task.name, task.revisit) for task in stream] == [("photo", False), ("sketch", True), ("cartoon", True)]
    assert all(task.classes == [0, 1, 2, 3] for task in stream)
    for task, value in zip(stream, (0, 1, 2), strict=True):
        expected = rows_by_hand(lambda domain, value=value: domain == value, DOMAIN)
        assert task.train_rows.tolist() == task.test_rows.tolist() == expected
    chosen = DomainIncrementalStream(data, data, to_tensor, domains=["cartoon", "photo"])
    assert [task.name for task in chosen] == ["cartoon", "photo"]
    assert [task.number for task in chosen] == [0, 1]
    assert not chosen.tasks[0].revisit


def test_domains_as_plain_numbers() -> None:
    data = row_values([0, 1] * 6).add_column("session", [10, 10, 9, 9, 3, 3] * 2)
    stream = DomainIncrementalStream(data, data, number_to_tensor, domain_column="session")
    assert [task.name for task in stream] == ["3", "9", "10"], "ascending as numbers, not as words"
    assert stream.tasks[0].train_rows.tolist() == [4, 5, 10, 11]
    later = DomainIncrementalStream(data, data, number_to_tensor, domain_column="session", domains=[10, 3])
    assert later.tasks[0].train_rows.tolist() == [0, 1, 6, 7]


def test_one_data_set_for_each_domain() -> None:
    parts = {name: birds(LABELS, seed) for seed, name in enumerate(("day", "night"))}
    tests = {name: birds(LABELS[:4], seed + 5) for seed, name in enumerate(("day", "night"))}
    stream = DomainIncrementalStream(parts, tests, to_tensor)
    assert [task.name for task in stream] == ["day", "night"]
    for task in stream:
        for rows, own, train in ((task.train_rows, parts[task.name], True), (task.test_rows, tests[task.name], False)):
            batch = next(iter(stream.images(rows, 64, train=train)))
            assert batch["labels"].tolist() == own["label"]
            assert (batch["pixel_values"] == number_stack(own)).all()


def number_stack(data: Dataset) -> Any:
    return np.stack([to_tensor(image).numpy() for image in data["image"]])


def test_a_common_test_set() -> None:
    train, test = birds(LABELS, domains=DOMAIN), birds([3, 2, 1, 0])
    stream = DomainIncrementalStream(train, test, to_tensor, common_test=True)
    assert all(task.test_rows.tolist() == [0, 1, 2, 3] for task in stream)
    seen = [i for batch in stream.all_images(train=False, batch_size=3) for i in batch["sample_ids"]]
    assert seen == [0, 1, 2, 3], "each image once"
    with pytest.raises(ValueError, match="the test set has no column 'domain'"):
        DomainIncrementalStream(train, test, to_tensor)


def test_bad_domains() -> None:
    data = birds(LABELS, domains=DOMAIN)
    with pytest.raises(ValueError, match=r"domain 'clipart' has no training images; .* domains \['cartoon', 'photo'"):
        DomainIncrementalStream(data, data, to_tensor, domains=["photo", "clipart"])
    with pytest.raises(ValueError, match=r"domains \['photo'\] come twice"):
        DomainIncrementalStream(data, data, to_tensor, domains=["photo", "sketch", "photo"])
    with pytest.raises(ValueError, match=r"domain 'cartoon' has no test images of classes \[3\]"):
        DomainIncrementalStream(data, data.select([i for i in range(24) if i not in (11, 15)]), to_tensor)
    with pytest.raises(ValueError, match="domain 'sketch' has no test images;"):
        DomainIncrementalStream(data, data.select(range(8)), to_tensor)
    with pytest.raises(ValueError, match=r"test images are of domains \['sketch'\], which no training image is of"):
        DomainIncrementalStream(data.select(range(16)), data, to_tensor)
    other = birds(LABELS, names=CLASSES[::-1])
    with pytest.raises(ValueError, match="name their classes differently"):
        DomainIncrementalStream({"a": birds(LABELS), "b": other}, {"a": birds(LABELS), "b": other}, to_tensor)


# ---- several data sets ---------------------------------------------------------------------------------------------


def test_data_sets_in_a_row() -> None:
    sets = {"first": birds([1, 0, 1, 0], 1, names=["x", "y", "z"]), "second": birds([2, 0, 1, 2], 2)}
    tests = {"first": birds([0, 1], 3, names=["x", "y", "z"]), "second": birds([1, 2, 0], 4)}
    stream = DatasetSequenceStream(sets, tests, to_tensor)
    # "first" has three classes, one of them without images: "second" starts at 3.
    assert [(task.name, task.classes) for task in stream] == [("first", [0, 1]), ("second", [3, 4, 5])]
    assert not any(task.revisit for task in stream)
    assert stream.class_names(stream.classes) == {
        0: "first/x", 1: "first/y", 3: "second/owl", 4: "second/jay", 5: "second/wren",
    }  # fmt: skip
    batch = next(iter(stream.images(stream.tasks[1].train_rows, 8)))
    assert batch["labels"].tolist() == [5, 3, 4, 5]
    assert batch["sample_ids"] == [4, 5, 6, 7]
    assert (batch["pixel_values"] == number_stack(sets["second"])).all()
    test = next(iter(stream.test_batches(stream.tasks[1], 8)))
    assert test["labels"].tolist() == [4, 5, 3]
    assert (test["pixel_values"] == number_stack(tests["second"])).all()


def test_data_sets_without_class_names() -> None:
    data = {"a": row_values([0, 4]), "b": row_values([1, 0])}
    stream = DatasetSequenceStream(data, data, number_to_tensor)
    assert [task.classes for task in stream] == [[0, 4], [5, 6]]
    assert stream.class_names([4, 5]) == {4: "a/4", 5: "b/0"}


def test_bad_data_sets() -> None:
    sets = {"a": birds(LABELS), "b": birds(LABELS)}
    with pytest.raises(ValueError, match=r"training sets are \['a', 'b'\] and test sets \['b', 'a'\]"):
        DatasetSequenceStream(sets, dict(reversed(sets.items())), to_tensor)
    with pytest.raises(ValueError, match=r"data set 'b': classes \[1, 2, 3\] have no test images"):
        DatasetSequenceStream(sets, sets | {"b": birds([0, 0])}, to_tensor)
    with pytest.raises(ValueError, match="the training b set has no column 'image'"):
        DatasetSequenceStream(sets | {"b": birds(LABELS).rename_column("image", "img")}, sets, to_tensor)
    with pytest.raises(ValueError, match="at least one data set"):
        DatasetSequenceStream({}, {}, to_tensor)


# ---- no tasks ------------------------------------------------------------------------------------------------------


def test_gaussian_schedule() -> None:
    """Classes come around evenly spaced times with the given spread, each image once."""
    classes, each, width = 20, 60, 0.05
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(classes), each))
    data = row_values(labels.tolist())
    order = np.random.default_rng(2).permutation(classes).tolist()
    stream = GaussianStream(data, data, number_to_tensor, classes=order, width=width, seed=4)
    assert stream.task_free
    assert len(stream) == 1
    (task,) = stream.tasks
    assert task.classes == order
    seen = [i for batch in stream.train_batches(task, 32, seed=9, epoch=0) for i in batch["sample_ids"]]
    assert sorted(seen) == list(range(classes * each))
    position = (np.arange(len(seen)) + 0.5) / len(seen)
    at = {c: position[labels[seen] == c] for c in range(classes)}
    for place, c in enumerate(order):
        if 3 * width < (place + 0.5) / classes < 1 - 3 * width:  # Gaussians that reach over an end are pressed together
            assert abs(at[c].mean() - (place + 0.5) / classes) < 4 * width / np.sqrt(each)
            assert 0.75 * width < at[c].std() < 1.3 * width
    # Sharper classes overlap less.
    sharp = GaussianStream(data, data, number_to_tensor, width=1e-4, seed=4)
    assert labels[sharp.tasks[0].train_rows].tolist() == sorted(labels.tolist())


def test_gaussian_stream_follows_from_its_seed() -> None:
    data = row_values(LABELS)
    rows = [GaussianStream(data, data, number_to_tensor, seed=seed).tasks[0].train_rows.tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    stream = GaussianStream(data, data, number_to_tensor)
    with pytest.raises(ValueError, match="epoch=1: a Gaussian stream is passed over once"):
        stream.train_batches(stream.tasks[0], 4, seed=0, epoch=1)


def test_bad_gaussian_streams() -> None:
    data = row_values(LABELS)
    for width in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a positive share of the stream"):
            GaussianStream(data, data, number_to_tensor, width=width)
    with pytest.raises(ValueError, match=r"classes \[9\] have no training images"):
        GaussianStream(data, data, number_to_tensor, classes=[0, 9])
    with pytest.raises(ValueError, match=r"names classes \[1\] twice"):
        GaussianStream(data, data, number_to_tensor, classes=[0, 1, 1])
    with pytest.raises(ValueError, match="is an IterableDataset, which has no rows by number"):
        GaussianStream(data.to_iterable_dataset(), data, number_to_tensor)


# ---- which stream it is --------------------------------------------------------------------------------------------


def test_fingerprint_tells_streams_apart() -> None:
    data = row_values(LABELS)

    def classes(tasks: list[list[int]], train: Dataset = data, **more: Any) -> str:
        return ClassIncrementalStream(train, data, tasks, number_to_tensor, **more).fingerprint()

    first = classes([[0, 1], [2, 3]])
    assert first == classes([[0, 1], [2, 3]])
    moved = row_values(LABELS[1:] + LABELS[:1])
    others = [
        classes([[0, 2], [1, 3]]),
        classes([[1, 0], [2, 3]]),
        classes([[0], [1, 2, 3]]),
        classes([[0, 1], [2, 3]], moved),
        classes([[0, 1], [2, 3]], row_values([1, 0, *LABELS[2:]])),
        classes([[0, 1], [2, 3]], augmentation=CropAndFlip()),
        classes([[0, 1], [2, 3]], augmentation=CropAndFlip(flip=0)),
        GaussianStream(data, data, number_to_tensor).fingerprint(),
        GaussianStream(data, data, number_to_tensor, seed=1).fingerprint(),
        GaussianStream(data, data, number_to_tensor, width=0.1).fingerprint(),
    ]
    assert len({first, *others}) == 1 + len(others)
