"""Streams over data sets that can only be read in order."""

import pickle
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from support.stream_data import birds, row_values, to_tensor
from torch import Tensor

from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
)
from cl_prompts.continual.streams.iterable import StreamedImages, content_number


LABELS = [0, 1, 2, 3] * 6
DOMAIN = [0] * 8 + [2] * 8 + [1] * 8
TASKS = [[0, 3], [2]]  # class 1 is in no task


def in_order(data: Dataset, shards: int = 3) -> IterableDataset:
    return data.to_iterable_dataset(num_shards=shards)


def stream_of(data: Dataset | None = None, test: Any = None, **more: Any) -> IterableClassIncrementalStream:
    data = birds(LABELS) if data is None else data
    return IterableClassIncrementalStream(
        in_order(data), in_order(data) if test is None else test, TASKS, to_tensor, **more
    )


def seen(batches: Any) -> list[tuple[int, int]]:
    """(number, label) of every real image."""
    pairs = [p for batch in batches for p in zip(batch["sample_ids"], batch["labels"].tolist(), strict=True)]
    return [pair for pair in pairs if pair[1] >= 0]


def numbers(data: Dataset) -> list[int]:
    return [content_number(cell) for cell in data.to_iterable_dataset().decode(False)["image"]]


def test_tasks_get_their_images() -> None:
    stream, known = stream_of(), numbers(birds(LABELS))
    assert len(set(known)) == len(known)
    assert not stream.random_access
    assert stream.class_names([3]) == {3: "crow"}
    for task in stream:
        expected = sorted((number, label) for number, label in zip(known, LABELS, strict=True) if label in task.classes)
        for epoch in (0, 1):
            assert sorted(seen(stream.train_batches(task, 4, seed=0, epoch=epoch))) == expected
        in_turn = [pair for pair in zip(known, LABELS, strict=True) if pair[1] in task.classes]
        assert seen(stream.test_batches(task, 4)) == in_turn
    images = {number: to_tensor(image) for number, image in zip(known, birds(LABELS)["image"], strict=True)}
    for batch in stream.train_batches(stream.tasks[0], 5, seed=0, epoch=0):
        assert all(torch.equal(x, images[i]) for i, x in zip(batch["sample_ids"], batch["pixel_values"], strict=True))
        assert batch.keys() == {"pixel_values", "labels", "sample_ids"}


def test_order_follows_from_seed_task_and_epoch_alone() -> None:
    stream = stream_of()
    orders = [seen(stream.train_batches(stream.tasks[0], 4, seed=s, epoch=e)) for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 3
    plain = stream_of(buffer_size=0)
    orders = [seen(plain.train_batches(plain.tasks[0], 4, seed=0, epoch=epoch)) for epoch in (0, 1)]
    assert orders[0] == orders[1] == seen(plain.test_batches(plain.tasks[0], 4))


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    assert len(one) == len(other)
    return all(
        a["sample_ids"] == b["sample_ids"] and torch.equal(a["pixel_values"], b["pixel_values"])
        for a, b in zip(one, other, strict=True)
    )


def test_loader_processes_and_a_later_start_change_nothing() -> None:
    """More loader processes than shards, too: each goes through the whole source."""
    data = in_order(birds(LABELS), shards=1)
    stream = IterableClassIncrementalStream(data, data, TASKS, to_tensor, augmentation=CropAndFlip())
    arguments: dict[str, Any] = dict(seed=0, epoch=2)
    whole = list(stream.train_batches(stream.tasks[0], 2, **arguments))
    assert len(whole) == 6
    assert same(whole, list(stream.train_batches(stream.tasks[0], 2, **arguments, num_workers=2)))
    for start, workers in ((1, 0), (2, 0), (6, 0), (3, 2)):
        rest = stream.train_batches(stream.tasks[0], 2, **arguments, start=start, num_workers=workers)
        assert same(whole[start:], list(rest))


def test_augmentation_follows_from_the_images_content() -> None:
    stream = stream_of(augmentation=CropAndFlip())

    def images(batch_size: int, epoch: int, buffer_size: int) -> dict[int, Tensor]:
        stream.buffer_size = buffer_size
        batches = stream.train_batches(stream.tasks[0], batch_size, seed=0, epoch=epoch)
        return {i: x for batch in batches for i, x in zip(batch["sample_ids"], batch["pixel_values"], strict=True)}

    first, other, later = images(3, 0, 1000), images(5, 0, 0), images(3, 1, 1000)
    assert first.keys() == other.keys() == later.keys()
    assert all(torch.equal(first[i], other[i]) for i in first)
    assert sum(torch.equal(first[i], later[i]) for i in first) < 2


def test_shares_of_several_processes_make_up_the_batches_of_one() -> None:
    stream = stream_of()
    one = StreamedImages(stream, stream.train_sources[0], "train", 8, 0, None, None)
    parts = []
    for rank in range(2):
        images = StreamedImages(stream, stream.train_sources[0], "train", 8, 0, None, None)
        images.rank, images.processes = rank, 2
        parts.append(list(images))
    for whole, left, right in zip(one, *parts, strict=True):
        assert len(left["labels"]) == len(right["labels"])
        assert seen([left, right]) == seen([whole])


def test_domains_by_column_and_by_data_set() -> None:
    data = birds(LABELS, domains=DOMAIN)
    known = numbers(data)
    by_column = IterableDomainIncrementalStream(
        in_order(data), data, range(4), to_tensor, domains=["cartoon", "photo"]
    )  # test rows by number
    assert [(task.name, task.revisit) for task in by_column] == [("cartoon", False), ("photo", True)]
    for task, value in zip(by_column, (2, 0), strict=True):
        rows = [row for row, domain in enumerate(DOMAIN) if domain == value]
        assert sorted(seen(by_column.train_batches(task, 3, seed=0, epoch=0))) == sorted(
            (known[r], LABELS[r]) for r in rows
        )
        assert [i for batch in by_column.test_batches(task, 3) for i in batch["sample_ids"]] == rows
    parts = {"day": birds(LABELS[:8], 1), "night": birds(LABELS[:4], 2)}
    sources = {name: in_order(part, 1) for name, part in parts.items()}
    by_name = IterableDomainIncrementalStream(sources, sources, range(4), to_tensor)
    for task in by_name:
        assert task.classes == [0, 1, 2, 3]
        for batches in (by_name.train_batches(task, 3, seed=0, epoch=0), by_name.test_batches(task, 3)):
            assert sorted(i for i, _ in seen(batches)) == sorted(numbers(parts[task.name]))


def test_a_test_set_with_rows() -> None:
    data = birds(LABELS)
    stream, whole = stream_of(data, test=data), ClassIncrementalStream(data, data, TASKS, to_tensor)
    for own, other in zip(stream, whole, strict=True):
        assert own.test_rows.tolist() == other.test_rows.tolist()
        assert same(list(stream.test_batches(own, 4)), list(whole.test_batches(other, 4)))
        assert same(list(stream.images(own.test_rows, 4, train=False)), list(whole.test_batches(other, 4)))


def test_steps_are_known_where_images_are_counted() -> None:
    stream = stream_of(train_images=[12, 6])
    assert [stream.steps_per_epoch(task, 5) for task in stream] == [3, 2]
    assert all(len(list(stream.train_batches(t, 5, seed=0, epoch=0))) == stream.steps_per_epoch(t, 5) for t in stream)
    wrong = stream_of(train_images=[13, 6])
    with pytest.raises(ValueError, match="the pass over the train set gave 12 images, not the 13 of train_images"):
        list(wrong.train_batches(wrong.tasks[0], 5, seed=0, epoch=0))
    for counts in ([12], [12, 0]):
        with pytest.raises(ValueError, match="give a positive number for each of 2 tasks"):
            stream_of(train_images=counts)


def test_what_needs_rows_is_refused() -> None:
    stream = stream_of()
    task, why = stream.tasks[0], "IterableDataset, which has no rows by number.*load it without streaming=True"
    attempts: list[Any] = [
        lambda: stream.train_labels[[0]],
        lambda: len(task.train_rows),
        lambda: stream.images(task.train_rows, 4),
        lambda: stream.images(task.test_rows, 4, train=False),
        lambda: stream.all_images(train=True, batch_size=4),
        lambda: stream.train_batches(task, 4, seed=0, epoch=0, rows=[0]),
        lambda: stream.train_batches(task, 4, seed=0, epoch=0, memory_rows=[0], memory_batch_size=1),
        lambda: stream.train_batches(task, 4, seed=0, epoch=0, queries=torch.zeros(24, 4)),
        lambda: stream.test_batches(task, 4, queries=torch.zeros(24, 4)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=why):
            attempt()
    with pytest.raises(ValueError, match="cannot be counted before they are read: give train_images"):
        stream.steps_per_epoch(task, 4)


def test_bad_sources() -> None:
    data = birds(LABELS)
    with pytest.raises(ValueError, match=r"task 1 repeats classes \[0\]"):
        IterableClassIncrementalStream(in_order(data), in_order(data), [[0], [0]], to_tensor)
    with pytest.raises(ValueError, match="the training set has no column 'kind'"):
        stream_of(label_column="kind")
    with pytest.raises(ValueError, match=r"column 'image' of the training set is no Image: use cast_column"):
        stream_of(row_values(LABELS))
    absent = IterableClassIncrementalStream(in_order(data), in_order(data), [[0], [9]], to_tensor)
    with pytest.raises(ValueError, match="the pass over the train set gave 0 images"):
        list(absent.train_batches(absent.tasks[1], 4, seed=0, epoch=0))
    domains = birds(LABELS, domains=DOMAIN)
    with pytest.raises(ValueError, match="cannot be listed before it is read: give domains"):
        IterableDomainIncrementalStream(in_order(domains), domains, range(4), to_tensor)
    with pytest.raises(ValueError, match=r"domains=\['photo', 'photo'\]: name each once"):
        IterableDomainIncrementalStream(in_order(domains), domains, range(4), to_tensor, domains=["photo", "photo"])
    with pytest.raises(ValueError, match=r"there is no training set of domain 'dusk', only of \['day'\]"):
        IterableDomainIncrementalStream({"day": in_order(data)}, {"dusk": data}, range(4), to_tensor, domains=["dusk"])
    few = IterableDomainIncrementalStream(in_order(domains), in_order(domains), [0, 1], to_tensor, domains=["photo"])
    with pytest.raises(ValueError, match=r"a train image has label 2, and the stream's classes are \[0, 1\]"):
        list(few.train_batches(few.tasks[0], 8, seed=0, epoch=0))
    with pytest.raises(ValueError, match=r"domain 'photo': test images are of classes \[2, 3\], which the stream has not"):
        IterableDomainIncrementalStream(in_order(domains), domains, [0, 1], to_tensor, domains=["photo"])
    with pytest.raises(ValueError, match="the training set is a Dataset, which need not be streamed: use the stream for"):
        IterableClassIncrementalStream(birds(LABELS), birds(LABELS), [[0, 3], [2]], to_tensor)  # type: ignore[arg-type]
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"a global batch of {size} images"):
            stream_of().train_batches(stream_of().tasks[0], size, seed=0, epoch=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images(workers: int) -> None:
    bad = (0, 7, 12)
    data = birds(LABELS, bad=bad)
    known = numbers(data)
    stream = stream_of(data, on_bad_image="skip")
    found = list(stream.train_batches(stream.tasks[0], 3, seed=0, epoch=0, num_workers=workers))
    assert sorted(seen(found)) == sorted(
        (n, c) for r, (n, c) in enumerate(zip(known, LABELS, strict=True)) if c in (0, 3) and r not in bad
    )
    assert sum(len(batch["labels"]) for batch in found) == 12
    assert stream.skipped["train"] == sorted(known[row] for row in bad)
    if not workers:
        strict = stream_of(data)
        with pytest.raises(ValueError, match=r"the image of train file cut.png, label \d, cannot be read"):
            list(strict.train_batches(strict.tasks[0], 3, seed=0, epoch=0))


def test_a_batch_of_bad_images_alone() -> None:
    data = birds([0, 3, 0, 2], bad=(0, 1))
    stream = IterableClassIncrementalStream(
        in_order(data, 1), data, [[0, 3], [2]], to_tensor, on_bad_image="skip", buffer_size=0
    )
    batch, last = stream.train_batches(stream.tasks[0], 2, seed=0, epoch=0)
    assert batch["labels"].tolist() == [-100, -100]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert last["labels"].tolist() == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_without_a_readable_image_is_not_trained_silently(workers: int) -> None:
    data = birds([0, 3, 0, 2], bad=(0, 1, 2))
    stream = IterableClassIncrementalStream(in_order(data, 1), data, [[0, 3], [2]], to_tensor, on_bad_image="skip")
    with pytest.raises(ValueError, match="none of the 3 train images of this task can be read: repair some"):
        list(stream.train_batches(stream.tasks[0], 2, seed=0, epoch=0, num_workers=workers))
    list(stream.train_batches(stream.tasks[1], 2, seed=0, epoch=0, num_workers=workers))


def test_a_share_without_a_readable_image_is_no_error() -> None:
    """As the loader process has it that gets the first batch alone, and a resumed run whose last batch is bad."""
    data = birds([0, 3, 0, 2], bad=(0, 1))
    stream = IterableClassIncrementalStream(
        in_order(data, 1), data, [[0, 3], [2]], to_tensor, on_bad_image="skip", buffer_size=0
    )
    assert len(list(stream.train_batches(stream.tasks[0], 2, seed=0, epoch=0, num_workers=2))) == 2
    turned = IterableClassIncrementalStream(
        in_order(data.select([2, 0, 1, 3]), 1), data, [[0, 3], [2]], to_tensor, on_bad_image="skip", buffer_size=0
    )
    (left,) = turned.train_batches(turned.tasks[0], 1, seed=0, epoch=0, start=2)
    assert left["labels"].tolist() == [-100]


def test_fingerprint_and_fresh_processes() -> None:
    prints = {
        stream_of().fingerprint(),
        stream_of(buffer_size=5).fingerprint(),
        stream_of(augmentation=CropAndFlip()).fingerprint(),
        IterableClassIncrementalStream(in_order(birds(LABELS)), birds(LABELS), [[0], [2]], to_tensor).fingerprint(),
    }
    assert len(prints) == 4
    assert stream_of().fingerprint() in prints
    stream = stream_of()
    images = StreamedImages(stream, stream.train_sources[0], "train", 4, 0, None, None)
    assert same(list(images), list(pickle.loads(pickle.dumps(images))))
