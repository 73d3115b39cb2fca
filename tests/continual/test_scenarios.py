"""Which images the tasks of each scenario have, and which arguments a scenario refuses."""

from collections.abc import Callable
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
    IterableClassIncrementalStream,
    JointStream,
    Stream,
    split_classes,
)


LABELS = [0, 1, 2, 3] * 6
DOMAIN = [0] * 8 + [2] * 8 + [1] * 8


def class_stream(
    train: Dataset, tasks: Any = ((0,), (1,)), test: Dataset | None = None, **more: Any
) -> ClassIncrementalStream:
    return ClassIncrementalStream(train, train if test is None else test, tasks, number_to_tensor, **more)


# ---- new classes ---------------------------------------------------------------------------------------------------


def test_split_classes() -> None:
    assert split_classes([7, 1, 3, 9, 5], 2) == [[1, 3, 5], [7, 9]]
    assert split_classes([4, 2, 0, 1, 3], [1, 3, 1]) == [[0], [1, 2, 3], [4]]
    shuffled = split_classes(range(100), 10, seed=4)
    assert shuffled == split_classes(reversed(range(100)), 10, seed=4)
    assert shuffled not in (split_classes(range(100), 10, seed=5), split_classes(range(100), 10))
    assert sorted(c for task in shuffled for c in task) == list(range(100))
    assert all(len(task) == 10 and all(type(c) is int for c in task) for task in shuffled)
    unequal = split_classes(range(100), [90, 10], seed=4)
    assert [len(task) for task in unequal] == [90, 10]
    assert [c for task in unequal for c in task] == [c for task in shuffled for c in task]
    for tasks in (0, 6, [2, 2], [5, 0], [], [6, -1]):
        with pytest.raises(ValueError, match="5 classes cannot be split into"):
            split_classes(range(5), tasks)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 6), max_size=4), max_size=4))
def test_tasks_are_accepted_or_refused_with_a_reason(tasks: list[list[int]]) -> None:
    """Never a stream with an empty task, an unknown class or one class in two tasks."""
    labels = [0, 3, 1, 2, 2, 3, 4]
    data = row_values(labels)
    named = [c for task in tasks for c in task]
    fine = tasks and all(tasks) and len(set(named)) == len(named) and set(named) <= set(range(5))
    if fine:
        stream = class_stream(data, tasks)
        assert [task.classes for task in stream] == tasks
        assert stream.classes == named
        assert [task.number for task in stream] == list(range(len(tasks)))
        for task in stream:
            rows = [row for row, label in enumerate(labels) if label in task.classes]
            assert task.train_rows.tolist() == task.test_rows.tolist() == rows
    else:
        why = "no classes|ids start at 0|twice|repeats classes|no training images|at least one task"
        with pytest.raises(ValueError, match=why):
            class_stream(data, tasks)


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        (2, r"tasks=2: give the class ids of each task \(split_classes"),
        ([0, 1], "task 0 is 0: give a list of class ids for each task"),
        ([[0], ["owl"]], "task 1 names 'owl', which is no class id"),
        (["01"], "task 0 is '01': give a list of class ids for each task"),
        ([[0, 1.5]], r"task 0 names 1\.5, which is no class id"),
        ([[0, 1], [2, 1, 0]], r"task 1 repeats classes \[0, 1\]"),
        ([[0, 1], [2, 11]], r"task 1: classes \[11\] have no training images"),
        ([[0, 1], [2, 3]], r"task 1: classes \[3\] have no test images"),
    ],
)
def test_bad_tasks(tasks: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        class_stream(row_values([0, 1, 2, 3]), tasks, row_values([0, 1, 2]))


@pytest.mark.parametrize(
    ("train", "test", "why"),
    [
        ([0, 1, -1], [0, 1], "the label of training row 2 is -1: class ids start at 0"),
        ([0, 1, 1], [0, 1, 7], r"test images are of classes \[7\], which no training image has"),
        ([], [0], "the training set is empty"),
        ([0, 1, None, 1], [0], "column 'label' of the training set holds None in row 2, which is no class id"),
        ([0.0, float("nan"), 1.0], [0], "column 'label' of the training set holds nan in row 1, which is no class id"),
        (["owl", "jay"], [0], "training labels are names, like 'jay', and test labels are not: give both the same kind"),
        ([[0], [1], [0]], [0], r"column 'label' of the training set holds lists, like \[0\]: give each row one value"),
        ([[0, 1], [1], [0]], [0], r"column 'label' of the training set holds lists, like \[0, 1\]"),
    ],
)
def test_bad_labels(train: list[Any], test: list[Any], why: str) -> None:
    data, tests = (Dataset.from_dict({"image": list(range(len(labels))), "label": labels}) for labels in (train, test))
    with pytest.raises(ValueError, match=why):
        class_stream(data, test=tests)


def test_bad_columns_and_settings() -> None:
    data = row_values([0, 1])
    with pytest.raises(ValueError, match=r"the training set has no column 'img', its columns are \['image', 'label'\]"):
        class_stream(data, image_column="img")
    with pytest.raises(ValueError, match="the training set has no column 'fine'"):
        class_stream(data, label_column="fine")
    with pytest.raises(ValueError, match=r"on_bad_image='ignore': choose one of \['stop', 'skip'\]"):
        class_stream(data, on_bad_image="ignore")
    for build in (class_stream, lambda data: GaussianStream(data, data, number_to_tensor)):
        with pytest.raises(ValueError, match=r"is an IterableDataset, which has no rows.*IterableClassIncrementalStream"):
            build(data.to_iterable_dataset())


def test_tasks_as_arrays() -> None:
    for tasks in (np.array([[0, 3], [1, 2]]), torch.tensor([[0, 3], [1, 2]])):
        assert [task.classes for task in class_stream(row_values([0, 1, 2, 3]), tasks)] == [[0, 3], [1, 2]]


def test_class_names() -> None:
    stream = ClassIncrementalStream(birds(LABELS), birds(LABELS), [[2, 0], [1, 3]], to_tensor)
    assert stream.class_names([3, 0]) == {3: "crow", 0: "owl"}
    assert class_stream(row_values([0]), [[0]]).class_names([0]) == {}


# ---- new domains ---------------------------------------------------------------------------------------------------


def test_domains_by_column() -> None:
    data = birds(LABELS, domains=DOMAIN)
    stream = DomainIncrementalStream(data, data, to_tensor)
    assert [(task.name, task.revisit) for task in stream] == [("photo", False), ("sketch", True), ("cartoon", True)]
    assert all(task.classes == [0, 1, 2, 3] for task in stream)
    for task, value in zip(stream, (0, 1, 2), strict=True):
        expected = [row for row, domain in enumerate(DOMAIN) if domain == value]
        assert task.train_rows.tolist() == task.test_rows.tolist() == expected
    chosen = DomainIncrementalStream(data, data, to_tensor, domains=["cartoon", "photo"])
    assert [(task.number, task.name) for task in chosen] == [(0, "cartoon"), (1, "photo")]
    assert not chosen.tasks[0].revisit


def test_domains_as_plain_numbers() -> None:
    data = row_values([0, 1] * 6).add_column("session", [10, 10, 9, 9, 3, 3] * 2)
    stream = DomainIncrementalStream(data, data, number_to_tensor, domain_column="session")
    assert [task.name for task in stream] == ["3", "9", "10"], "ascending as numbers, not as words"
    assert stream.tasks[0].train_rows.tolist() == [4, 5, 10, 11]
    later = DomainIncrementalStream(data, data, number_to_tensor, domain_column="session", domains=[10, 3])
    assert later.tasks[0].train_rows.tolist() == [0, 1, 6, 7]


def pixels_of(data: Dataset) -> Any:
    return np.stack([to_tensor(image).numpy() for image in data["image"]])


def test_one_data_set_per_domain() -> None:
    parts = {name: birds(LABELS, seed) for seed, name in enumerate(("day", "night"))}
    tests = {name: birds(LABELS[:4], seed + 5) for seed, name in enumerate(("day", "night"))}
    stream = DomainIncrementalStream(parts, tests, to_tensor)
    assert [task.name for task in stream] == ["day", "night"]
    for task in stream:
        for rows, own, train in ((task.train_rows, parts[task.name], True), (task.test_rows, tests[task.name], False)):
            batch = next(iter(stream.images(rows, 64, train=train)))
            assert batch["labels"].tolist() == own["label"]
            assert (batch["pixel_values"] == pixels_of(own)).all()


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
    a, b = birds(LABELS), birds(LABELS, names=CLASSES[::-1])
    cases: list[tuple[Any, Any, list[str] | None, str]] = [
        (data, data, ["photo", "clipart"], r"domain 'clipart' has no training images; .* domains \['cartoon', 'photo'"),
        (data, data, ["photo", "sketch", "photo"], r"domains \['photo'\] are given twice"),
        (data, data.select([*range(11), *range(12, 15), *range(16, 24)]), None, r"'cartoon' has no test images of .*\[3\]"),
        (data, data.select(range(8)), None, "domain 'sketch' has no test images;"),
        (data.select(range(16)), data, None, r"test images are of domains \['sketch'\], which no training image is of"),
        ({"a": a, "b": b}, {"a": a, "b": b}, None, "have different class names"),
    ]
    for train, test, domains, why in cases:
        with pytest.raises(ValueError, match=why):
            DomainIncrementalStream(train, test, to_tensor, domains=domains)


# ---- several data sets ---------------------------------------------------------------------------------------------


def test_data_sets_in_sequence() -> None:
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
    assert (batch["pixel_values"] == pixels_of(sets["second"])).all()
    test = next(iter(stream.test_batches(stream.tasks[1], 8)))
    assert test["labels"].tolist() == [4, 5, 3]
    assert (test["pixel_values"] == pixels_of(tests["second"])).all()


def test_data_sets_without_class_names() -> None:
    data = {"a": row_values([0, 4]), "b": row_values([1, 0])}
    stream = DatasetSequenceStream(data, data, number_to_tensor)
    assert [task.classes for task in stream] == [[0, 4], [5, 6]]
    assert stream.class_names([4, 5]) == {4: "a/4", 5: "b/0"}


def test_bad_data_sets() -> None:
    sets = {"a": birds(LABELS), "b": birds(LABELS)}
    renamed = sets | {"b": birds(LABELS).rename_column("image", "img")}
    cases: list[tuple[dict[str, Dataset], dict[str, Dataset], str]] = [
        (sets, dict(reversed(sets.items())), r"training sets are \['a', 'b'\] and test sets \['b', 'a'\]"),
        (sets, sets | {"b": birds([0, 0])}, r"data set 'b': classes \[1, 2, 3\] have no test images"),
        (renamed, sets, "the training b set has no column 'image'"),
        ({}, {}, "at least one data set"),
    ]
    for train, test, why in cases:
        with pytest.raises(ValueError, match=why):
            DatasetSequenceStream(train, test, to_tensor)


# ---- no tasks ------------------------------------------------------------------------------------------------------


def test_gaussian_schedule() -> None:
    """Classes come around evenly spaced times with the given spread, each image once."""
    classes, each, width = 20, 60, 0.05
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(classes), each))
    data = row_values(labels.tolist())
    order = np.random.default_rng(2).permutation(classes).tolist()
    stream = GaussianStream(data, data, number_to_tensor, classes=order, width=width, seed=4)
    assert stream.task_free
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
    with pytest.raises(ValueError, match="epoch=1: a Gaussian stream has one epoch"):
        stream.train_batches(stream.tasks[0], 4, seed=0, epoch=1)


def test_a_gaussian_stream_in_parts() -> None:
    """Parts follow each other in time; a class is in all parts with its images, and is tested in the one with most."""
    labels = np.repeat(np.arange(8), 40)
    data = row_values(labels.tolist())
    whole, stream = (GaussianStream(data, data, number_to_tensor, width=0.08, seed=3, parts=n) for n in (1, 4))
    assert whole.task_free
    assert not stream.task_free
    assert stream.fingerprint() != whole.fingerprint()
    assert np.concatenate([task.train_rows for task in stream]).tolist() == whole.tasks[0].train_rows.tolist()
    known = set[int]()
    for task in stream:
        assert len(task.train_rows) == 80
        assert sorted(task.classes) == sorted(set(labels[task.train_rows].tolist()))
        assert task.revisit == bool(known & set(task.classes))
        known |= set(task.classes)
        tested = set(labels[task.test_rows].tolist())
        assert tested <= set(task.classes)
        for c in tested:
            assert (labels[task.train_rows] == c).sum() == max((labels[t.train_rows] == c).sum() for t in stream)
        epochs = [[i for b in stream.train_batches(task, 16, seed=0, epoch=e) for i in b["sample_ids"]] for e in (0, 1)]
        assert epochs[0] != epochs[1]
        assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(task.train_rows.tolist())
    assert stream.tasks[1].revisit
    assert sorted(np.concatenate([task.test_rows for task in stream]).tolist()) == list(range(320))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        *(({"width": w}, "must be a positive fraction of the stream") for w in (0, -1.0, float("nan"), float("inf"))),
        *(({"parts": n}, f"parts={n} must be an integer of at least 1") for n in (0, -1, True, 2.0)),
        ({"parts": 40}, r"parts=40: part \d+ has most of the images of no class: choose fewer parts"),
        ({"classes": [0, 9]}, r"classes \[9\] have no training images"),
        ({"classes": [0, 1, 1]}, r"names classes \[1\] twice"),
    ],
)
def test_bad_gaussian_streams(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        GaussianStream(row_values(LABELS), row_values(LABELS), number_to_tensor, **options)


# ---- joint training ------------------------------------------------------------------------------------------------


def test_a_joint_stream_has_all_training_images_so_far() -> None:
    stream = class_stream(row_values(LABELS), [[2, 0], [1], [3]])
    joint = JointStream(stream)
    for number, task in enumerate(joint):
        so_far = stream.tasks[: number + 1]
        assert task.classes == [c for part in so_far for c in part.classes]
        assert sorted(task.train_rows.tolist()) == sorted(row for part in so_far for row in part.train_rows.tolist())
        assert task.test_rows.tolist() == stream.tasks[number].test_rows.tolist()
        assert task.revisit == (number > 0)
    (last,) = JointStream(stream, only_last=True)
    assert last.classes == [2, 0, 1, 3]
    assert sorted(last.train_rows.tolist()) == last.test_rows.tolist() == list(range(24))


def test_a_joint_stream_needs_images_by_row_number() -> None:
    source = birds(LABELS).to_iterable_dataset()
    stream = IterableClassIncrementalStream(source, source, [[0, 1]], to_tensor)
    with pytest.raises(ValueError, match="joint training needs images by row number, and this class-incremental, in order"):
        JointStream(stream)


# ---- which stream it is --------------------------------------------------------------------------------------------


def test_fingerprint_tells_streams_apart() -> None:
    data, tasks = row_values(LABELS), [[0, 1], [2, 3]]
    build: list[Callable[[], Stream]] = [
        lambda: class_stream(data, tasks),
        lambda: class_stream(data, [[0, 2], [1, 3]]),
        lambda: class_stream(data, [[1, 0], [2, 3]]),
        lambda: class_stream(data, [[0], [1, 2, 3]]),
        lambda: class_stream(row_values(LABELS[1:] + LABELS[:1]), tasks),
        lambda: class_stream(row_values([1, 0, *LABELS[2:]]), tasks),
        lambda: class_stream(data, tasks, augmentation=CropAndFlip()),
        lambda: class_stream(data, tasks, augmentation=CropAndFlip(flip=0)),
        lambda: GaussianStream(data, data, number_to_tensor),
        lambda: GaussianStream(data, data, number_to_tensor, seed=1),
        lambda: GaussianStream(data, data, number_to_tensor, width=0.1),
    ]
    first, second = ([stream().fingerprint() for stream in build] for _ in range(2))
    assert first == second
    assert len(set(first)) == len(build)
