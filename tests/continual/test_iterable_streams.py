"""Streams over data sets that can only be read in order."""

import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.stream_data import birds, images_by_id, row_values, to_tensor, train_batches

from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    IndexedStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
)
from cl_prompts.continual.streams.indexed import require_indexed
from cl_prompts.continual.streams.iterable import StreamedImages, content_id


pytestmark = pytest.mark.by_turns(3)


LABELS = [0, 1, 2, 3] * 6
DOMAIN = [0] * 8 + [2] * 8 + [1] * 8
TASKS = [[0, 3], [2]]  # class 1 is in no task


def in_order(data: Dataset, shards: int = 3) -> IterableDataset:
    return data.to_iterable_dataset(num_shards=shards)


def stream_of(data: Any = None, test: Any = None, tasks: Any = TASKS, **more: Any) -> IterableClassIncrementalStream:
    data = in_order(birds(LABELS)) if data is None else data
    return IterableClassIncrementalStream(data, data if test is None else test, tasks, to_tensor, **more)


def seen(batches: Any) -> list[tuple[int, int]]:
    """(id, label) of every real image."""
    pairs = [p for batch in batches for p in zip(batch["sample_ids"], batch["labels"].tolist(), strict=True)]
    return [pair for pair in pairs if pair[1] >= 0]


def ids_of(data: Dataset) -> list[int]:
    return [content_id(cell) for cell in data.to_iterable_dataset().decode(False)["image"]]


def test_tasks_get_their_images() -> None:
    stream, known = stream_of(), ids_of(birds(LABELS))
    assert len(set(known)) == len(known)
    assert stream.class_names([3]) == {3: "crow"}
    for number, task in enumerate(stream):
        expected = [pair for pair in zip(known, LABELS, strict=True) if pair[1] in task.classes]
        for epoch in (0, 1):
            assert sorted(seen(train_batches(stream, number, epoch=epoch))) == sorted(expected)
        assert seen(stream.test_batches(task, 4)) == expected
    images = {number: to_tensor(image) for number, image in zip(known, birds(LABELS)["image"], strict=True)}
    for batch in train_batches(stream, batch_size=5):
        assert all(torch.equal(x, images[i]) for i, x in zip(batch["sample_ids"], batch["pixel_values"], strict=True))
        assert batch.keys() == {"pixel_values", "labels", "sample_ids"}


def test_the_shuffle_buffer() -> None:
    """Without it images come in the order of the source; augmentation depends on the image, not on its place."""
    shuffled, plain = stream_of(augmentation=CropAndFlip()), stream_of(augmentation=CropAndFlip(), buffer_size=0)
    assert seen(train_batches(plain)) == seen(train_batches(plain, epoch=1)) == seen(plain.test_batches(plain.tasks[0], 4))
    first, other = (images_by_id(train_batches(stream)) for stream in (shuffled, plain))
    assert list(first) != list(other)
    assert all(torch.equal(first[i], other[i]) for i in other)


def same(one: Any, other: Any) -> bool:
    return all(
        a["sample_ids"] == b["sample_ids"] and torch.equal(a["pixel_values"], b["pixel_values"])
        for a, b in zip(one, other, strict=True)
    )


def test_shards_of_several_processes_make_up_the_batches_of_one() -> None:
    stream = stream_of()
    one, *two = (StreamedImages(stream, stream.train_sources[0], "train", 8) for _ in range(3))
    for rank, images in enumerate(two):
        images.rank, images.processes = rank, 2
    for whole, left, right in zip(one, *two, strict=True):
        assert len(left["labels"]) == len(right["labels"])
        assert seen([left, right]) == seen([whole])


def test_domains_by_column_and_by_data_set() -> None:
    data = birds(LABELS, domains=DOMAIN)
    known = ids_of(data)
    # The test set has rows by number.
    by_column = IterableDomainIncrementalStream(in_order(data), data, range(4), to_tensor, domains=["cartoon", "photo"])
    assert [(task.name, task.revisit) for task in by_column] == [("cartoon", False), ("photo", True)]
    for task, value in zip(by_column, (2, 0), strict=True):
        rows = [row for row, domain in enumerate(DOMAIN) if domain == value]
        assert sorted(seen(train_batches(by_column, task.number, 3))) == sorted((known[r], LABELS[r]) for r in rows)
        assert [i for batch in by_column.test_batches(task, 3) for i in batch["sample_ids"]] == rows
    parts = {"day": birds(LABELS[:8], 1), "night": birds(LABELS[:4], 2)}
    sources = {name: in_order(part, 1) for name, part in parts.items()}
    by_name = IterableDomainIncrementalStream(sources, sources, range(4), to_tensor)
    for task in by_name:
        assert task.classes == [0, 1, 2, 3]
        for batches in (train_batches(by_name, task.number, 3), by_name.test_batches(task, 3)):
            assert sorted(i for i, _ in seen(batches)) == sorted(ids_of(parts[task.name]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_test_set_with_rows_by_number(num_workers: int) -> None:
    data = birds(LABELS)
    stream, indexed = stream_of(test=data), ClassIncrementalStream(data, data, TASKS, to_tensor)
    for own, other in zip(stream, indexed, strict=True):
        assert same(stream.test_batches(own, 4, num_workers=num_workers), indexed.test_batches(other, 4))


def test_steps_are_known_if_images_are_counted() -> None:
    stream = stream_of(train_images=[12, 6])
    assert [stream.steps_per_epoch(task, 5) for task in stream] == [3, 2]
    assert [len(list(train_batches(stream, task, 5))) for task in (0, 1)] == [3, 2]
    with pytest.raises(ValueError, match="the pass over the train set gave 12 images, not the 13 of train_images"):
        list(train_batches(stream_of(train_images=[13, 6])))
    for counts in ([12], [12, 0]):
        with pytest.raises(ValueError, match="give a positive number for each of 2 tasks"):
            stream_of(train_images=counts)
    with pytest.raises(ValueError, match="cannot be counted before they are read: give train_images"):
        stream_of().steps_per_epoch(stream.tasks[0], 4)


def test_what_needs_rows_is_not_there() -> None:
    """An iterable stream has no method of an indexed one, and arguments that need row numbers are no arguments."""
    stream = stream_of()
    assert not isinstance(stream, IndexedStream)
    with pytest.raises(ValueError, match=r"^rehearsal needs images by row number, .* is read in order: load the data set"):
        require_indexed(stream, "rehearsal")
    for name in ("images", "all_images", "all_rows", "train_labels", "test_labels"):
        assert not hasattr(stream, name)
    assert not any(hasattr(stream.tasks[0], name) for name in ("train_rows", "test_rows"))
    for given in ({"rows": [0]}, {"memory_rows": [0]}, {"queries": torch.zeros(24, 4)}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            train_batches(stream, **given)
    data = birds(LABELS)
    indexed = ClassIncrementalStream(data, data, TASKS, to_tensor)
    with pytest.raises(TypeError, match=r"task 0 has no row numbers: take a task of this stream, stream\.tasks\[0\]"):
        indexed.test_batches(stream.tasks[0], 4)


DATA, DOMAINS = birds(LABELS), birds(LABELS, domains=DOMAIN)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"tasks": [[0], [0]]}, r"task 1 repeats classes \[0\]"),
        ({"label_column": "kind"}, "the training set has no column 'kind'"),
        ({"data": in_order(row_values(LABELS))}, r"column 'image' of the training set is no Image: use cast_column"),
        ({"data": DATA}, "the training set is a Dataset, not an IterableDataset: use the stream for data sets with rows"),
        ({"test": DATA.select([1, 2])}, r"task 0: classes \[0, 3\] have no test images"),
        ({"test": DATA.remove_columns("image")}, "the test set has no column 'image'"),
    ],
)
def test_bad_sources(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        stream_of(**arguments)


@pytest.mark.parametrize(
    ("source", "test", "classes", "domains", "why"),
    [
        (in_order(DOMAINS), DOMAINS, range(4), None, "cannot be listed before it is read: give domains"),
        (in_order(DOMAINS), DOMAINS, range(4), ["photo", "photo"], r"domains=\['photo', 'photo'\]: name each domain once"),
        (in_order(DOMAINS), DOMAINS, range(4), ["dusk"], r"domain 'dusk' has no test images; the test set has domains"),
        (
            {"day": in_order(DATA)},
            {"dusk": DATA},
            range(4),
            ["dusk"],
            r"no training set of domain 'dusk', only of",
        ),
        (in_order(DOMAINS), DOMAINS, [0, 1], ["photo"], r"domain 'photo': test images are of classes \[2, 3\]"),
    ],
)
def test_bad_domains(source: Any, test: Any, classes: Any, domains: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        IterableDomainIncrementalStream(source, test, classes, to_tensor, domains=domains)


def test_what_only_reading_shows_to_be_wrong() -> None:
    with pytest.raises(ValueError, match="the pass over the train set gave 0 images"):
        list(train_batches(stream_of(tasks=[[0], [9]]), 1))
    few = IterableDomainIncrementalStream(in_order(DOMAINS), in_order(DOMAINS), [0, 1], to_tensor, domains=["photo"])
    with pytest.raises(ValueError, match=r"a train image has label 2, and the stream's classes are \[0, 1\]"):
        list(train_batches(few))
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"a global batch of {size} images"):
            train_batches(stream_of(), batch_size=size)


# ---- images that cannot be read ------------------------------------------------------------------------------------


def with_bad(labels: list[int], *bad: int, shards: int = 1, **more: Any) -> IterableClassIncrementalStream:
    data = birds(labels, bad=bad)
    return stream_of(in_order(data, shards), data, on_bad_image="skip", **more)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images(num_workers: int) -> None:
    bad = (0, 7, 12)
    known = ids_of(birds(LABELS, bad=bad))
    stream = with_bad(LABELS, *bad, shards=3)
    found = list(train_batches(stream, batch_size=3, num_workers=num_workers))
    assert sorted(seen(found)) == sorted(
        (n, c) for r, (n, c) in enumerate(zip(known, LABELS, strict=True)) if c in (0, 3) and r not in bad
    )
    assert sum(len(batch["labels"]) for batch in found) == 12
    assert stream.skipped["train"] == sorted(known[row] for row in bad)
    if not num_workers:
        stream.on_bad_image = "stop"
        with pytest.raises(ValueError, match=r"the image of train file cut.png, label \d, cannot be read"):
            list(train_batches(stream, batch_size=3))


def test_a_batch_of_bad_images_alone() -> None:
    batch, last = train_batches(with_bad([0, 3, 0, 2], 0, 1, buffer_size=0), batch_size=2)
    assert batch["labels"].tolist() == [-100, -100]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert last["labels"].tolist() == [0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_task_without_a_readable_image_is_not_trained_silently(num_workers: int) -> None:
    stream = with_bad([0, 3, 0, 2], 0, 1, 2)
    with pytest.raises(ValueError, match="none of the 3 train images of this task can be read: repair some"):
        list(train_batches(stream, batch_size=2, num_workers=num_workers))
    assert len(seen(train_batches(stream, 1, 2, num_workers=num_workers))) == 1


def test_a_shard_without_a_readable_image_is_no_error() -> None:
    """It happens in a loader process that gets the first batch only, and in a resumed run whose last batch is bad."""
    assert len(list(train_batches(with_bad([0, 3, 0, 2], 0, 1, buffer_size=0), batch_size=2, num_workers=2))) == 2
    (left,) = train_batches(with_bad([0, 0, 3, 2], 1, 2, buffer_size=0), batch_size=1, start=2)
    assert left["labels"].tolist() == [-100]


def test_fingerprint_and_fresh_processes() -> None:
    streams = [{}, {"buffer_size": 5}, {"augmentation": CropAndFlip()}, {"tasks": [[0], [2]]}]
    first, second = ([stream_of(**options).fingerprint() for options in streams] for _ in range(2))
    assert first == second
    assert len(set(first)) == 4
    stream = stream_of()
    images = StreamedImages(stream, stream.train_sources[0], "train", 4)
    assert same(images, pickle.loads(pickle.dumps(images)))
