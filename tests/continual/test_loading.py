"""Batches: rehearsed images, resumed epochs, augmentation, images that cannot be read, loader processes."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from support.families import build
from support.stream_data import (
    birds,
    broken,
    encoded,
    images_by_id,
    number_to_tensor,
    pictures,
    row_values,
    sample_ids,
    to_tensor,
    train_batches,
)
from torch import Tensor
from torch.nn import functional as F

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, CropAndFlip, accuracy, stream_features
from cl_prompts.continual.streams.indexed_images import IndexedImages
from cl_prompts.continual.streams.loading import PADDING_ID, padding_index, process_shard, process_shards
from cl_prompts.interfaces import IGNORE_INDEX


pytestmark = pytest.mark.by_turns(3)


LABELS = [0, 1, 2, 3] * 6


def plain(tasks: Any = ((0, 1), (2, 3))) -> ClassIncrementalStream:
    return ClassIncrementalStream(row_values(LABELS), row_values(LABELS), tasks, number_to_tensor)


# ---- rehearsed images and resumed epochs ---------------------------------------------------------------------------


def test_rehearsed_images_join_each_batch() -> None:
    stream, memory = plain(), [0, 1, 4, 5, 8]
    alone = sample_ids(train_batches(stream, 1, 5, seed=1))

    def rehearsed(size: int = 3, rows: Any = memory, **more: Any) -> list[list[int]]:
        """The rehearsed images of each batch, which stand behind the others."""
        batches = train_batches(stream, 1, 5, **{"seed": 1, **more}, memory_rows=rows, memory_batch_size=size)
        for batch in batches:
            assert batch["labels"].tolist() == [LABELS[i] for i in batch["sample_ids"]]
            assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["sample_ids"]
        if not more:
            assert [ids[: len(own)] for ids, own in zip(sample_ids(batches), alone, strict=True)] == alone
        return [ids[len(own) :] for ids, own in zip(sample_ids(batches), alone, strict=True)]

    drawn = rehearsed()
    assert all(len(set(ids)) == 3 and set(ids) <= set(memory) for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 1, "drawn anew for every step"
    assert rehearsed() == drawn
    assert drawn not in (rehearsed(seed=2), rehearsed(epoch=1))
    assert [sorted(ids) for ids in rehearsed(50)] == [memory] * 3, "all of them if there are fewer"
    assert rehearsed(rows=[]) == [[], [], []]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4))
def test_shards_make_up_the_batch(rows: int, batch: int, processes: int) -> None:
    """Over all processes each image is real once, in order, and shards have the same length."""
    numbers = list(range(rows))[:batch]
    parts = [process_shard(numbers, rank, processes, padding_index) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [row for part in parts for row in part]
    assert [row for row in together if row >= 0] == numbers
    assert all(padding_index(row) in numbers for row in together if row < 0)
    assert len(together) - len(numbers) < processes


def test_an_epoch_continues_at_its_next_step() -> None:
    stream, read = plain(), []
    stream.transform = lambda number: (read.append(number), number_to_tensor(number))[1]
    arguments: dict[str, Any] = dict(seed=3, epoch=2, memory_rows=[0, 1, 4, 5], memory_batch_size=2)
    whole = sample_ids(train_batches(stream, 1, 5, **arguments))
    for start in range(len(whole) + 1):
        read.clear()
        rest = train_batches(stream, 1, 5, **arguments, start=start)
        assert len(rest) == len(whole) - start
        assert sample_ids(rest) == whole[start:]
        assert read == [i for ids in whole[start:] for i in ids], "images of steps left out are not read"
    with pytest.raises(ValueError, match="start=4: the epoch has 3 steps"):
        train_batches(stream, 1, 5, **arguments, start=4)


def test_other_rows_than_the_tasks() -> None:
    stream, rows = plain(), [0, 1, 2, 7, 8]
    batches = sample_ids(train_batches(stream, 1, rows=rows))
    assert sorted(i for batch in batches for i in batch) == rows
    assert stream.steps_per_epoch(stream.tasks[1], 4, rows=rows) == len(batches) == 2
    assert stream.steps_per_epoch(stream.tasks[1], 5) == len(train_batches(stream, 1, 5)) == 3
    assert sample_ids(stream.images([5, 1, 3], 2)) == [[5, 1], [3]]


@pytest.mark.parametrize(
    ("rows", "why"),
    [([24], "there is no row 24 among 24"), ([-1], "no row -1"), ([0, 2], r"of classes \[2\], which no task")],
)
def test_bad_rows(rows: list[int], why: str) -> None:
    stream = plain([[0], [1]])
    for attempt in (
        lambda: stream.images(rows, 2),
        lambda: train_batches(stream, rows=rows),
        lambda: train_batches(stream, memory_rows=rows, memory_batch_size=1),
    ):
        with pytest.raises(ValueError, match=why):
            attempt()


def test_a_batch_size_of_zero() -> None:
    with pytest.raises(ValueError, match="batch_size=0 must be a positive number"):
        list(process_shards([1, 2], 0))


# ---- augmentation --------------------------------------------------------------------------------------------------


def augmenting(augmentation: CropAndFlip | None = CropAndFlip()) -> ClassIncrementalStream:  # noqa: B008 - frozen
    return ClassIncrementalStream(birds(LABELS), birds(LABELS), [[0, 1], [2, 3]], to_tensor, augmentation=augmentation)


def test_an_image_is_augmented_alike_in_other_company() -> None:
    """Among other rows, and rehearsed in another task. Images asked for by row number are not augmented."""
    stream = augmenting()
    task = stream.tasks[0]
    first = images_by_id(train_batches(stream, epoch=1))
    memory: dict[str, Any] = {"memory_rows": task.train_rows, "memory_batch_size": 12}
    for batches in (
        train_batches(stream, epoch=1, rows=task.train_rows[:3]),
        train_batches(stream, 1, 6, epoch=1, **memory),
    ):
        found = {i: x for i, x in images_by_id(batches).items() if i in first}
        assert len(found) >= 3
        assert all(torch.equal(x, first[i]) for i, x in found.items())
    for batches in (stream.images(task.train_rows, 4), stream.test_batches(task, 4)):
        assert all(torch.equal(x, to_tensor(stream.train[i]["image"])) for i, x in images_by_id(batches).items())


def test_views_come_again_in_turn() -> None:
    """They are the crops of the first epochs without `views`."""
    stream, fresh = augmenting(CropAndFlip(views=3)), augmenting()
    epochs = [images_by_id(train_batches(stream, epoch=epoch)) for epoch in range(7)]
    first = [images_by_id(train_batches(fresh, epoch=epoch)) for epoch in range(3)]
    for number in first[0]:
        assert all(torch.equal(epochs[e][number], first[e % 3][number]) for e in range(7))
    assert all(any(not torch.equal(first[a][n], first[b][n]) for n in first[0]) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_a_batch_is_cropped_on_the_device_as_each_image_alone() -> None:
    augmentation = CropAndFlip(scale=(0.2, 0.9), on_device=True)
    stream = augmenting(augmentation)
    torch.manual_seed(0)
    images = torch.rand(6, 3, 40, 56)
    batch = {"pixel_values": images, "sample_ids": [3, 0, 5, -1, 2, 9]}
    crops = stream.augment_on_device(batch, (1, 4))["pixel_values"]
    assert crops.shape == images.shape
    for number, image, found in zip(batch["sample_ids"], images, crops, strict=True):
        assert torch.equal(augmentation.apply_batch(image[None], 1, 4, [number])[0], found), "other images do not matter"
        crop = augmentation.apply(image, 1, 4, max(number, 0))
        expected = F.interpolate(crop[None], (40, 56), mode="bilinear", align_corners=False)[0]
        # At its border a crop that was cut first lacks the pixels beside it.
        edge_h, edge_w = -(-40 // crop.shape[1]), -(-56 // crop.shape[2])
        inner = (slice(None), slice(edge_h, -edge_h), slice(edge_w, -edge_w))
        torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-4)
    whole = CropAndFlip(scale=(1, 1), ratio=(56 / 40, 56 / 40), flip=1, on_device=True)
    torch.testing.assert_close(whole.apply_batch(images, 0, 0, range(6)), images.flip(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_crops_on_the_device_do_not_depend_on_autocast(dtype: torch.dtype) -> None:
    """Queries are computed under autocast and steps crop their images outside of it: both must get the same crops."""
    augmentation, images = CropAndFlip(on_device=True), torch.rand(4, 3, 40, 56)
    outside = augmentation.apply_batch(images, 0, 0, range(4))
    with torch.autocast("cpu", dtype):
        assert torch.equal(augmentation.apply_batch(images, 0, 0, range(4)), outside)


def test_augmentation_on_the_device_leaves_the_loader_alone() -> None:
    stream = augmenting(CropAndFlip(on_device=True))
    for batch in train_batches(stream, epoch=1):
        whole = torch.stack([to_tensor(stream.train[i]["image"]) for i in batch["sample_ids"]])
        assert torch.equal(batch["pixel_values"], whole)
        assert not torch.equal(stream.augment_on_device(batch, (0, 1))["pixel_values"], whole)
        assert stream.augment_on_device(batch, None) is batch


def test_queries_do_not_fit_augmented_images() -> None:
    stream, queries = augmenting(), torch.zeros(len(LABELS), 4)
    with pytest.raises(ValueError, match="draws new ones in every epoch: pass queries=None, or set views"):
        train_batches(stream, queries=queries)
    assert "query" in next(iter(train_batches(augmenting(CropAndFlip(views=1)), queries=queries)))
    assert "query" in next(iter(stream.images([0], 1, queries=queries)))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10_000), st.booleans())
def test_a_crop_lies_in_the_image(width: int, height: int, number: int, narrow: bool) -> None:
    augmentation = CropAndFlip(scale=(0.9, 1.0) if narrow else (0.05, 1.0))
    left, top, right, bottom = augmentation.box(width, height, np.random.default_rng(number))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_crops_have_the_given_areas_and_ratios() -> None:
    """On a large image, where every draw fits: uniform areas, log-uniform ratios, uniform places."""
    augmentation = CropAndFlip(scale=(0.05, 0.4))
    random = np.random.default_rng(0)
    boxes = np.array([augmentation.box(1000, 1000, random) for _ in range(4000)], dtype=float)
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    quantiles = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    assert np.quantile(wide * high / 1e6, quantiles) == pytest.approx(0.05 + 0.35 * quantiles, abs=0.02)
    assert np.quantile(np.log(wide / high), quantiles) == pytest.approx((2 * quantiles - 1) * np.log(4 / 3), abs=0.03)
    assert np.quantile(boxes[:, 0] / (1000 - wide), quantiles) == pytest.approx(quantiles, abs=0.03)


def test_an_image_is_cropped_and_flipped() -> None:
    image = pictures(1, size=(20, 30))[0]
    pixels = np.array(image)
    for flip, expected in ((0, pixels), (1, pixels[:, ::-1])):
        whole = CropAndFlip(scale=(1, 1), ratio=(1.5, 1.5), flip=flip)
        assert np.array_equal(np.array(whole.apply(image, 0, 0, 0)), expected)
    flips = 0
    for number in range(60):
        crop = np.array(CropAndFlip().apply(image, 0, 0, number))
        tensor = CropAndFlip().apply(torch.from_numpy(pixels).permute(2, 0, 1), 0, 0, number)
        assert np.array_equal(crop, tensor.permute(1, 2, 0).numpy()), "tensors are cropped like images"
        left, top, right, bottom = CropAndFlip().box(30, 20, np.random.default_rng([0, 0, number, 1]))
        expected = pixels[top:bottom, left:right]
        flipped = not np.array_equal(crop, expected)
        flips += flipped
        assert np.array_equal(crop, expected[:, ::-1] if flipped else expected)
    assert 15 < flips < 45
    # Too wide for any allowed ratio: the center.
    assert CropAndFlip(scale=(1, 1)).box(90, 12, np.random.default_rng(0)) == (37, 0, 53, 12)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", (0, 1)), ("scale", (0.5, 0.2)), ("scale", (0.1, 1.2)), ("ratio", (2, 1)), ("ratio", (0, 1)), ("flip", 2),
     ("views", 0)],
)  # fmt: skip
def test_bad_augmentation(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        CropAndFlip(**{field: value})


# ---- images that cannot be read ------------------------------------------------------------------------------------


def with_bad(*bad: int, on_bad_image: str = "skip") -> ClassIncrementalStream:
    data = birds(LABELS, bad=bad)
    return ClassIncrementalStream(data, data, [[0, 1], [2, 3]], to_tensor, on_bad_image=on_bad_image)


def test_a_bad_image_stops_with_its_name() -> None:
    stream = with_bad(6, on_bad_image="stop")
    assert len(list(train_batches(stream))) == 3, "the other task's images are fine"
    with pytest.raises(ValueError, match=r"the image of train row 6, file cut.png, cannot be read .*on_bad_image='skip'"):
        list(train_batches(stream, 1))
    with pytest.raises(ValueError, match="the image of test row 6"):
        list(stream.test_batches(stream.tasks[1], 4))
    assert stream.skipped == {"train": [], "test": []}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_become_padding_and_are_counted(num_workers: int) -> None:
    bad, queries = (6, 10, 23), torch.arange(24.0)[:, None]
    stream = with_bad(*bad)
    for _ in range(2):  # an image counts once
        batches = list(train_batches(stream, 1, 5, num_workers=num_workers, queries=queries))
    assert stream.skipped == {"train": list(bad), "test": []}
    assert stream.count_skipped() == 3
    whole = birds(LABELS)["image"]
    for batch, rows in zip(batches, sample_ids(train_batches(plain(), 1, 5)), strict=True):
        assert batch.keys() == {"pixel_values", "labels", "sample_ids", "query"}
        assert batch["sample_ids"] == [PADDING_ID if row in bad else row for row in rows]
        assert batch["labels"].tolist() == [IGNORE_INDEX if row in bad else LABELS[row] for row in rows]
        # A bad image is replaced by a whole image of the task with its own query.
        shown = [{6: 7, 10: 11, 23: 2}.get(row, row) for row in rows]
        assert torch.equal(batch["pixel_values"], torch.stack([to_tensor(whole[row]) for row in shown]))
        assert batch["query"].flatten().tolist() == shown
    for task, skipped in ((0, 3), (1, 6)):
        list(stream.test_batches(stream.tasks[task], 4))
        assert stream.count_skipped() == skipped


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_task_without_a_readable_image_is_named(num_workers: int) -> None:
    """It is not trained on padding. One readable image is enough, and it replaces the others."""
    for readable in ((), (7,)):
        stream = with_bad(*(row for row, label in enumerate(LABELS) if label > 1 and row not in readable))
        assert len(images_by_id(train_batches(stream, num_workers=num_workers))) == 12
        second = train_batches(stream, 1, num_workers=num_workers)
        if readable:
            assert sorted(i for ids in sample_ids(second) for i in ids) == [PADDING_ID] * 11 + [7]
            whole = to_tensor(birds(LABELS)[7]["image"])
            assert all(torch.equal(image, whole) for batch in second for image in batch["pixel_values"])
        else:
            with pytest.raises(ValueError, match="none of the 12 train images of task 1 can be read"):
                list(second)


def test_evaluation_and_training_skip_bad_images() -> None:
    """With a whole batch unreadable, accuracy counts the rest, features stay zero, and the loss is finite."""
    data = birds(LABELS, bad=(0, 1, 2, 3))

    def resize(image: Any) -> Tensor:
        return F.interpolate(to_tensor(image)[None] / 255, size=(32, 32))[0]

    stream = ClassIncrementalStream(data, data, [[0, 1, 2, 3]], resize, on_bad_image="skip")
    model = get_prompt_pool_model(build("vit"), L2PConfig(pool_size=4, prompt_length=2, top_k=1))
    model.begin_task([0, 1, 2, 3])
    model.train()
    for batch in stream.images(range(24), 4):
        assert torch.isfinite(model(**batch).loss)
    model.eval()
    _, images = accuracy(model, stream.test_batches(stream.tasks[0], 4), model.classes, "cpu")
    assert images == 20
    table = stream_features(model, stream.all_images(train=True, batch_size=8), 24, "cpu")
    assert not table[:4].any()
    assert table[4:].any(1).all()


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    """In an image folder the error names the file."""
    for name in ("jay", "owl"):
        (tmp_path / name).mkdir()
        for number, image in enumerate(pictures(3)):
            image.save(tmp_path / name / f"{number}.png")
    (tmp_path / "owl" / "2.png").write_bytes(b"no image at all")
    data = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    stream = ClassIncrementalStream(data, data, [[0], [1]], to_tensor)
    with pytest.raises(ValueError, match=r"train row 5, file .*owl/2\.png, cannot be read \(it is no JPEG, PNG,"):
        list(stream.images(stream.tasks[1].train_rows, 3))


class OpenedFiles:
    """Rows by number whose images are opened, not decoded; no `datasets.Dataset`."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __getitem__(self, key: Any) -> Any:
        return [0] * len(self.files) if key == "label" else {"image": PILImage.open(io.BytesIO(self.files[key]))}


def test_a_truncated_file_is_found_if_images_are_decoded_late() -> None:
    whole, other = pictures(2)
    data = OpenedFiles([encoded(whole)["bytes"], broken(other)["bytes"]])
    stream = ClassIncrementalStream(data, data, [[0]], to_tensor, on_bad_image="skip")
    (batch,) = stream.images([0, 1], 2)
    assert batch["labels"].tolist() == [0, IGNORE_INDEX]
    stream.on_bad_image = "stop"
    with pytest.raises(ValueError, match="the image of train row 1 cannot be read"):
        list(stream.images([0, 1], 2))


def test_nothing_to_read() -> None:
    features = Features({"image": Image(), "label": ClassLabel(names=["owl"])})
    empty = Dataset.from_dict({"image": [None, None], "label": [0, 0]}, features=features)
    for on_bad_image, why in (
        ("skip", "none of the 2 train images can be read"),
        ("stop", r"train row 0 cannot be read \(the cell is empty\)"),
    ):
        stream = ClassIncrementalStream(empty, empty, [[0]], to_tensor, on_bad_image=on_bad_image)
        with pytest.raises(ValueError, match=why):
            list(stream.images([0], 1))


def test_images_can_be_sent_to_a_fresh_loader_process() -> None:
    """The start methods `spawn` and `forkserver` pickle the data set."""
    stream = augmenting()
    images = IndexedImages(stream, "train", stream.train, stream.train_labels, augmented_by=(0, 1))
    there = pickle.loads(pickle.dumps(images))
    for index in (0, 5, padding_index(7)):
        here, sent = images[index], there[index]
        assert torch.equal(here.pop("pixel_values"), sent.pop("pixel_values"))
        assert here == sent
