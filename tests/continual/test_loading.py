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
from support.stream_data import birds, broken, encoded, number_to_tensor, pictures, row_values, to_tensor
from torch import Tensor
from torch.nn import functional as F

from cl_prompts import L2PConfig, get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream, CropAndFlip, accuracy, stream_features
from cl_prompts.continual.streams.loading import PADDING_ID, IndexedImages, own_share, shares
from cl_prompts.interfaces import IGNORE_INDEX


LABELS = [0, 1, 2, 3] * 6


def plain(labels: list[int] = LABELS) -> ClassIncrementalStream:
    data = row_values(labels)
    return ClassIncrementalStream(data, data, [[0, 1], [2, 3]], number_to_tensor)


def ids(batches: Any) -> list[list[int]]:
    return [batch["sample_ids"] for batch in batches]


# ---- rehearsed images and resumed epochs ---------------------------------------------------------------------------


def test_rehearsed_images_join_each_batch() -> None:
    stream, memory = plain(), [0, 1, 4, 5, 8]
    task = stream.tasks[1]
    alone = ids(stream.train_batches(task, 5, seed=1, epoch=0))
    batches = list(stream.train_batches(task, 5, seed=1, epoch=0, memory_rows=memory, memory_batch_size=3))
    assert [batch["sample_ids"][: len(own)] for batch, own in zip(batches, alone, strict=True)] == alone
    drawn = [tuple(batch["sample_ids"][len(own) :]) for batch, own in zip(batches, alone, strict=True)]
    assert all(len(set(d)) == 3 and set(d) <= set(memory) for d in drawn)
    assert len(set(drawn)) > 1, "drawn anew for every step"
    for batch in batches:
        assert batch["labels"].tolist() == [LABELS[i] for i in batch["sample_ids"]]
        assert batch["pixel_values"][:, 0, 0, 0].tolist() == batch["sample_ids"]
    again = ids(stream.train_batches(task, 5, seed=1, epoch=0, memory_rows=memory, memory_batch_size=3))
    assert again == ids(batches)
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        moved = ids(stream.train_batches(task, 5, **other, memory_rows=memory, memory_batch_size=3))
        assert [b[-3:] for b in moved] != [b[-3:] for b in ids(batches)]
    few = ids(stream.train_batches(task, 5, seed=1, epoch=0, memory_rows=memory, memory_batch_size=50))
    assert all(sorted(batch[len(own) :]) == memory for batch, own in zip(few, alone, strict=True))
    assert ids(stream.train_batches(task, 5, seed=1, epoch=0, memory_rows=[], memory_batch_size=3)) == alone


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4))
def test_shares_make_up_the_whole(rows: int, batch: int, processes: int) -> None:
    """Over all processes each image is real once, in order, and shares are equally long."""
    numbers = list(range(rows))[:batch]
    parts = [own_share(numbers, rank, processes, lambda row: -1 - row) for rank in range(processes)]
    assert len({len(part) for part in parts}) == 1
    together = [row for part in parts for row in part]
    assert [row for row in together if row >= 0] == numbers
    assert all(-1 - row in numbers for row in together if row < 0)
    assert len(together) - len(numbers) < processes


def test_an_epoch_goes_on_where_it_was() -> None:
    stream, read = plain(), []
    stream.transform = lambda number: (read.append(number), number_to_tensor(number))[1]
    arguments: dict[str, Any] = dict(seed=3, epoch=2, memory_rows=[0, 1, 4, 5], memory_batch_size=2)
    whole = ids(stream.train_batches(stream.tasks[1], 5, **arguments))
    for start in range(len(whole) + 1):
        read.clear()
        rest = stream.train_batches(stream.tasks[1], 5, **arguments, start=start)
        assert len(rest) == len(whole) - start
        assert ids(rest) == whole[start:]
        assert read == [i for batch in whole[start:] for i in batch], "images of steps left out are not read"
    with pytest.raises(ValueError, match="start=4: the epoch has 3 steps"):
        stream.train_batches(stream.tasks[1], 5, **arguments, start=4)


def test_other_rows_than_the_tasks() -> None:
    stream = plain()
    batches = ids(stream.train_batches(stream.tasks[1], 4, seed=0, epoch=0, rows=[0, 1, 2, 7, 8]))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 7, 8]
    assert stream.steps_per_epoch(stream.tasks[1], 5) == len(stream.train_batches(stream.tasks[1], 5, seed=0, epoch=0)) == 3
    assert stream.steps_per_epoch(stream.tasks[1], 4, rows=[0, 1, 2, 7, 8]) == len(batches) == 2
    assert ids(stream.images([5, 1, 3], 2)) == [[5, 1], [3]]
    some = ClassIncrementalStream(row_values(LABELS), row_values(LABELS), [[0], [1]], number_to_tensor)
    for rows, why in (
        ([24], "there is no row 24 among 24"),
        ([-1], "no row -1"),
        ([0, 2], r"of classes \[2\], which no task"),
    ):
        with pytest.raises(ValueError, match=why):
            some.images(rows, 2)
        with pytest.raises(ValueError, match=why):
            some.train_batches(some.tasks[0], 2, seed=0, epoch=0, rows=rows)
        with pytest.raises(ValueError, match=why):
            some.train_batches(some.tasks[0], 2, seed=0, epoch=0, memory_rows=rows, memory_batch_size=1)
    with pytest.raises(ValueError, match="batch_size=0 must be a positive number"):
        list(shares([1, 2], 0))


# ---- augmentation --------------------------------------------------------------------------------------------------


def augmenting(augmentation: CropAndFlip | None = CropAndFlip()) -> ClassIncrementalStream:  # noqa: B008 - frozen
    return ClassIncrementalStream(birds(LABELS), birds(LABELS), [[0, 1], [2, 3]], to_tensor, augmentation=augmentation)


def by_number(batches: Any) -> dict[int, Tensor]:
    return {i: x for batch in batches for i, x in zip(batch["sample_ids"], batch["pixel_values"], strict=True)}


def test_augmentation_follows_from_seed_epoch_and_image_alone() -> None:
    stream = augmenting()
    task = stream.tasks[0]
    first = by_number(stream.train_batches(task, 4, seed=0, epoch=1))
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    # Another batch size, other company, a resumed epoch, loader processes, another task's rehearsal.
    passes = [
        stream.train_batches(task, 5, seed=0, epoch=1, start=1),
        stream.train_batches(task, 4, seed=0, epoch=1, rows=task.train_rows[:3]),
        stream.train_batches(task, 6, seed=0, epoch=1, num_workers=2),
        stream.train_batches(stream.tasks[1], 6, seed=0, epoch=1, memory_rows=task.train_rows, memory_batch_size=12),
    ]
    for batches in passes:
        found = {i: x for i, x in by_number(batches).items() if i in first}
        assert len(found) >= 3
        assert all(torch.equal(x, first[i]) for i, x in found.items())
    assert torch.equal(torch.get_rng_state(), state)
    for other in ({"seed": 0, "epoch": 2}, {"seed": 1, "epoch": 1}):
        moved = by_number(stream.train_batches(task, 4, **other))
        assert sum(torch.equal(moved[i], first[i]) for i in first) < 2
    for batches in (stream.images(task.train_rows, 4), stream.test_batches(task, 4)):
        assert all(torch.equal(x, to_tensor(stream.train[i]["image"])) for i, x in by_number(batches).items())


def test_views_come_again_in_turn() -> None:
    stream = augmenting(CropAndFlip(views=3))
    epochs = [by_number(stream.train_batches(stream.tasks[0], 4, seed=0, epoch=epoch)) for epoch in range(7)]
    for number in epochs[0]:
        assert all(torch.equal(epochs[e][number], epochs[e % 3][number]) for e in range(7))
    assert all(any(not torch.equal(epochs[a][n], epochs[b][n]) for n in epochs[0]) for a, b in [(0, 1), (0, 2), (1, 2)])
    fresh = augmenting(CropAndFlip())
    for epoch in range(3):
        same = by_number(fresh.train_batches(fresh.tasks[0], 4, seed=0, epoch=epoch))
        assert all(torch.equal(x, epochs[epoch][number]) for number, x in same.items()), (
            "views are those of the first epochs"
        )


def test_a_batch_is_cut_on_the_device_as_each_image_alone() -> None:
    augmentation = CropAndFlip(scale=(0.2, 0.9), on_device=True)
    stream = augmenting(augmentation)
    torch.manual_seed(0)
    images = torch.rand(6, 3, 40, 56)
    batch = {"pixel_values": images, "sample_ids": [3, 0, 5, -1, 2, 9]}
    cut = stream.augment_on_device(batch, (1, 4))["pixel_values"]
    assert cut.shape == images.shape
    for number, image, found in zip(batch["sample_ids"], images, cut, strict=True):
        assert torch.equal(augmentation.apply_batch(image[None], 1, 4, [number])[0], found), "the company does not matter"
        part = augmentation.apply(image, 1, 4, max(number, 0))
        expected = F.interpolate(part[None], (40, 56), mode="bilinear", align_corners=False)[0]
        # At its own border a part that was cut out first knows nothing of the pixels beside it.
        edge_h, edge_w = -(-40 // part.shape[1]), -(-56 // part.shape[2])
        inner = (slice(None), slice(edge_h, -edge_h), slice(edge_w, -edge_w))
        torch.testing.assert_close(found[inner], expected[inner], rtol=1e-4, atol=1e-4)
    whole = CropAndFlip(scale=(1, 1), ratio=(56 / 40, 56 / 40), flip=1, on_device=True)
    torch.testing.assert_close(whole.apply_batch(images, 0, 0, range(6)), images.flip(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_where_a_batch_is_cut_does_not_depend_on_the_precision_around(dtype: torch.dtype) -> None:
    """Queries are computed under autocast, steps cut their images outside it: they must be the same parts."""
    augmentation, images = CropAndFlip(on_device=True), torch.rand(4, 3, 40, 56)
    plain = augmentation.apply_batch(images, 0, 0, range(4))
    with torch.autocast("cpu", dtype):
        assert torch.equal(augmentation.apply_batch(images, 0, 0, range(4)), plain)


def test_what_is_cut_on_the_device_leaves_the_loader_as_it_was() -> None:
    stream = augmenting(CropAndFlip(on_device=True))
    for batch in stream.train_batches(stream.tasks[0], 4, seed=0, epoch=1):
        plain = torch.stack([to_tensor(stream.train[i]["image"]) for i in batch["sample_ids"]])
        assert torch.equal(batch["pixel_values"], plain)
        assert not torch.equal(stream.augment_on_device(batch, (0, 1))["pixel_values"], plain)
        assert stream.augment_on_device(batch, None) is batch


def test_queries_do_not_fit_augmented_images() -> None:
    stream, queries = augmenting(), torch.zeros(len(LABELS), 4)
    with pytest.raises(ValueError, match="this stream augments anew in every epoch: pass queries=None, or set views"):
        stream.train_batches(stream.tasks[0], 4, seed=0, epoch=0, queries=queries)
    views = augmenting(CropAndFlip(views=1))
    assert "query" in next(iter(views.train_batches(views.tasks[0], 4, seed=0, epoch=0, queries=queries)))
    assert "query" in next(iter(stream.images([0], 1, queries=queries)))
    assert stream.augments
    assert not augmenting(None).augments


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 10_000), st.booleans())
def test_a_part_lies_in_the_image(width: int, height: int, number: int, narrow: bool) -> None:
    augmentation = CropAndFlip(scale=(0.9, 1.0) if narrow else (0.05, 1.0))
    left, top, right, bottom = augmentation.box(width, height, np.random.default_rng(number))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_parts_have_the_areas_and_ratios_asked_for() -> None:
    """On a large image, where every draw fits: uniform areas, log-uniform ratios, uniform places."""
    augmentation = CropAndFlip(scale=(0.05, 0.4))
    random = np.random.default_rng(0)
    boxes = np.array([augmentation.box(1000, 1000, random) for _ in range(4000)], dtype=float)
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    quantiles = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    assert np.quantile(wide * high / 1e6, quantiles) == pytest.approx(0.05 + 0.35 * quantiles, abs=0.02)
    assert np.quantile(np.log(wide / high), quantiles) == pytest.approx((2 * quantiles - 1) * np.log(4 / 3), abs=0.03)
    assert np.quantile(boxes[:, 0] / (1000 - wide), quantiles) == pytest.approx(quantiles, abs=0.03)


def test_a_part_is_cut_out_and_mirrored() -> None:
    image = pictures(1, size=(20, 30))[0]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    whole = CropAndFlip(scale=(1, 1), ratio=(1.5, 1.5), flip=0)
    assert np.array_equal(np.array(whole.apply(image, 0, 0, 0)), np.array(image))
    mirrored = CropAndFlip(scale=(1, 1), ratio=(1.5, 1.5), flip=1)
    assert np.array_equal(np.array(mirrored.apply(image, 0, 0, 0)), np.array(image)[:, ::-1])
    flips = 0
    for number in range(60):
        part = CropAndFlip().apply(image, 0, 0, number)
        tensor = CropAndFlip().apply(pixels, 0, 0, number)
        assert torch.equal(torch.from_numpy(np.array(part)).permute(2, 0, 1), tensor), "tensors are cut like images"
        left, top, right, bottom = CropAndFlip().box(30, 20, np.random.default_rng([0, 0, number, 1]))
        cut = np.array(image)[top:bottom, left:right]
        flips += not np.array_equal(np.array(part), cut)
        assert np.array_equal(np.array(part), cut) or np.array_equal(np.array(part), cut[:, ::-1])
    assert 15 < flips < 45
    # Too wide for any ratio allowed: the middle.
    assert CropAndFlip(scale=(1, 1)).box(90, 12, np.random.default_rng(0)) == (37, 0, 53, 12)


@pytest.mark.parametrize(
    "fields",
    [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.1, 1.2)}, {"ratio": (2, 1)}, {"ratio": (0, 1)}, {"flip": 2}],
)
def test_bad_augmentation(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        CropAndFlip(**fields)


# ---- images that cannot be read ------------------------------------------------------------------------------------


def with_bad(*bad: int, on_bad_image: str = "skip", **more: Any) -> ClassIncrementalStream:
    data = birds(LABELS, bad=bad)
    return ClassIncrementalStream(data, data, [[0, 1], [2, 3]], to_tensor, on_bad_image=on_bad_image, **more)


def test_a_bad_image_stops_with_its_name() -> None:
    stream = with_bad(6, on_bad_image="stop")
    assert len(ids(stream.train_batches(stream.tasks[0], 4, seed=0, epoch=0))) == 3, "the other task's images are fine"
    why = r"the image of train row 6, file cut.png, cannot be read .*on_bad_image='skip'"
    with pytest.raises(ValueError, match=why):
        list(stream.train_batches(stream.tasks[1], 4, seed=0, epoch=0))
    with pytest.raises(ValueError, match="the image of test row 6"):
        list(stream.test_batches(stream.tasks[1], 4))
    assert stream.skipped == {"train": [], "test": []}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_become_padding_and_are_counted(workers: int) -> None:
    bad, queries = (6, 10, 23), torch.arange(24.0)[:, None]
    stream = with_bad(*bad)
    for _ in range(2):  # twice: an image counts once
        batches = list(stream.train_batches(stream.tasks[1], 5, seed=0, epoch=0, num_workers=workers, queries=queries))
    assert stream.skipped == {"train": list(bad), "test": []}
    assert stream.count_skipped() == 3
    expected = ids(plain().train_batches(plain().tasks[1], 5, seed=0, epoch=0))
    for batch, rows in zip(batches, expected, strict=True):
        assert batch.keys() == {"pixel_values", "labels", "sample_ids", "query"}
        assert batch["sample_ids"] == [PADDING_ID if row in bad else row for row in rows]
        assert batch["labels"].tolist() == [IGNORE_INDEX if row in bad else LABELS[row] for row in rows]
        for place, row in enumerate(rows):
            # What fills the place is a whole image of the task with its own query.
            shown = row if row not in bad else {6: 7, 10: 11, 23: 2}[row]
            assert torch.equal(batch["pixel_values"][place], to_tensor(birds(LABELS)[shown]["image"]))
            assert batch["query"][place].item() == shown
    list(stream.test_batches(stream.tasks[0], 4))
    assert stream.count_skipped() == 3
    list(stream.test_batches(stream.tasks[1], 4))
    assert stream.count_skipped() == 6


def test_evaluation_and_training_pass_over_bad_images() -> None:
    """A run in which a whole batch is unreadable: accuracy counts the rest, features stay zero, the loss is finite."""
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
    """An image folder, as a user has it: the error names the file."""
    for name in ("jay", "owl"):
        (tmp_path / name).mkdir()
        for number, image in enumerate(pictures(3)):
            image.save(tmp_path / name / f"{number}.png")
    (tmp_path / "owl" / "2.png").write_bytes(b"no image at all")
    data = load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    stream = ClassIncrementalStream(data, data, [[0], [1]], to_tensor)
    with pytest.raises(ValueError, match=r"train row 5, file .*owl/2\.png, cannot be read \(UnidentifiedImageError"):
        list(stream.images(stream.tasks[1].train_rows, 3))


class OpenedFiles:
    """Rows by number whose images are opened, not decoded: no `datasets.Dataset`."""

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __getitem__(self, key: Any) -> Any:
        return [0] * len(self.files) if key == "label" else {"image": PILImage.open(io.BytesIO(self.files[key]))}


def test_a_file_cut_short_shows_where_images_are_decoded_late() -> None:
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
    stream = ClassIncrementalStream(empty, empty, [[0]], to_tensor, on_bad_image="skip")
    with pytest.raises(ValueError, match="none of the 2 train images can be read"):
        list(stream.images([0], 1))
    stream = ClassIncrementalStream(empty, empty, [[0]], to_tensor)
    with pytest.raises(ValueError, match=r"train row 0 cannot be read \(the cell is empty\)"):
        list(stream.images([0], 1))


def test_streams_can_be_sent_to_a_fresh_loader_process() -> None:
    """`spawn` and `forkserver` pickle the data set; so must we."""
    stream = augmenting()
    images = IndexedImages(stream, train=True, augmented_by=(0, 1))
    there = pickle.loads(pickle.dumps(images))
    for index in (0, 5, -1 - 7):
        here, sent = images[index], there[index]
        assert torch.equal(here.pop("pixel_values"), sent.pop("pixel_values"))
        assert here == sent
