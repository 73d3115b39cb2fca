"""Images that are decoded and resized once, and hidden states that are computed once: what is kept, what it equals."""

import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from support.query_images import picture_model, picture_stream
from support.small_runs import small_trainer, tensors
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor, ViTImageProcessor

from cl_prompts.continual import ContinualArguments, ContinualTrainer, CropAndFlip
from cl_prompts.continual.streams.kept_rows import KeptRows, PrivateFile
from cl_prompts.continual.streams.pixels import KeptPixels
from cl_prompts.continual.streams.transforms import ProcessorTransform


ROW = np.arange(12, dtype=np.float32).reshape(3, 4)


def test_rows_of_a_file_without_a_name(tmp_path: Path) -> None:
    file = PrivateFile(tmp_path / "not" / "there")
    kept = KeptRows(file, (3, 4), np.float32)
    assert not list(tmp_path.rglob("*")), "nobody else can change it, and it goes with the process"
    assert kept.read(0) is None
    kept.write(5, ROW)
    assert kept.read(4) is None, "a hole of zeros"
    assert kept.read(5).tolist() == ROW.tolist()  # type: ignore[union-attr]
    child = os.fork()
    if not child:
        kept.write(2, ROW + 1)
        os._exit(0)
    os.waitpid(child, 0)
    assert kept.read(2).tolist() == (ROW + 1).tolist(), "a loader process has written it"  # type: ignore[union-attr]
    os.pwrite(file.fileno(), b"\1", kept.size * 2 + 7)
    assert kept.read(2) is None
    os.truncate(file.fileno(), kept.size * 5 + 20)
    assert kept.read(5) is None, "cut short"


PROCESSORS: dict[str, Callable[[], Any]] = {
    "resized and normalized": lambda: ProcessorTransform(ViTImageProcessor(size={"height": 32, "width": 32})),
    "cut, each channel by its own numbers": lambda: ProcessorTransform(
        CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    ),
    "not normalized": lambda: ProcessorTransform(ViTImageProcessor(size={"height": 32, "width": 32}), do_normalize=False),
}


class Counted:
    """A transform that counts the images that it gets."""

    def __init__(self, transform: Any) -> None:
        self.transform, self.images = transform, 0

    def __call__(self, image: Any) -> Tensor:
        return self.transform(image)

    def resized(self, image: Any) -> Tensor:
        self.images += 1
        return self.transform.resized(image)


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_image_is_resized_once_to_the_same_bits(name: str) -> None:
    plain, counted = picture_stream(transform=PROCESSORS[name]()), Counted(PROCESSORS[name]())
    stream = picture_stream(transform=counted)
    stream.keep_pixels(2**20)
    for _ in range(2):
        for train in (True, False):
            pairs = zip(
                stream.all_images(train=train, batch_size=5), plain.all_images(train=train, batch_size=5), strict=True
            )
            assert all(torch.equal(kept["pixel_values"], read["pixel_values"]) for kept, read in pairs)
    assert counted.images == len(plain.all_rows(train=True)) + len(plain.all_rows(train=False))


class OfItself(Counted):
    """Normalizes each image by its own mean."""

    def __call__(self, image: Any) -> Tensor:
        pixels = self.resized(image).float()
        return pixels - pixels.mean()


class Fails(Counted):
    def resized(self, image: Any) -> Tensor:
        self.images += 1
        raise TypeError


@pytest.mark.parametrize(
    ("transform", "max_bytes", "tried"),
    [(Counted, 20_000, 1), (OfItself, 2**20, None), (Fails, 2**20, 1)],
    ids=["too large", "another number for each image", "does not resize"],
)
def test_images_that_are_not_kept(transform: Any, max_bytes: int, tried: int | None) -> None:
    stream = picture_stream(transform=transform(PROCESSORS["resized and normalized"]()))
    kept = KeptPixels(stream.transform, 26, max_bytes)
    images = [stream.column_of("train", stream.train).read(row, 10**6) for row in range(3)]
    assert [kept.keep(row, image, stream.pixels) for row, image in enumerate(images[1:])][-1] is None
    assert kept.read(0) is None
    assert tried is None or stream.transform.images == tried  # type: ignore[attr-defined]


def test_a_full_disk_only_costs_time(tmp_path: Path) -> None:
    stream = picture_stream(transform=PROCESSORS["resized and normalized"]())
    stream.keep_pixels(2**20)
    with open("/dev/full", "r+b") as full:
        stream.kept_pixels["train"]._file = full
        batches = [batch["pixel_values"] for batch in stream.all_images(train=True, batch_size=8)]
    expected = picture_stream(transform=PROCESSORS["resized and normalized"]()).all_images(train=True, batch_size=8)
    assert all(torch.equal(a, b["pixel_values"]) for a, b in zip(batches, expected, strict=True))
    assert stream.kept_pixels["train"].read(0) is None


def test_crops_are_not_mixed_up_with_whole_images() -> None:
    views = []
    for kept in (0, 2**20):
        stream = picture_stream(transform=PROCESSORS["not normalized"](), augmentation=CropAndFlip())
        stream.keep_pixels(kept)
        task = stream.tasks[0]
        list(stream.images(task.train_rows, 8))
        views.append([b["pixel_values"] for e in (0, 1) for b in stream.train_batches(task, 8, seed=0, epoch=e)])
    assert all(map(torch.equal, *views))


def test_loader_processes_share_them() -> None:
    """Those that are forked; a fresh one reads for itself."""
    counted = Counted(PROCESSORS["not normalized"]())
    stream = picture_stream(transform=counted)
    stream.keep_pixels(2**20)
    first = [batch["pixel_values"] for batch in stream.all_images(train=True, batch_size=8, num_workers=1)]
    second = [batch["pixel_values"] for batch in stream.all_images(train=True, batch_size=8)]
    assert all(map(torch.equal, first, second))
    again: KeptPixels = pickle.loads(pickle.dumps(stream.kept_pixels["train"]))
    assert again.read(0) is None


def run(**settings: Any) -> ContinualTrainer:
    stream = picture_stream(transform=PROCESSORS["resized and normalized"]())
    args = ContinualArguments(**{"num_train_epochs": 2, "batch_size": 8} | settings)
    trainer = ContinualTrainer(picture_model(), stream, args)
    trainer.train()
    return trainer


def test_a_run_with_kept_images_is_bit_equal() -> None:
    kept, read = run(), run(pixel_cache_bytes=0)
    assert kept.stream.kept_pixels["train"].read(0) is not None
    assert not read.stream.kept_pixels
    assert kept.matrix == read.matrix
    assert all(map(torch.equal, tensors(kept).values(), tensors(read).values()))


# Of the small stream: 5 tokens of width 16 in 16 bits and a checksum, 30 training and 12 test images.
@pytest.mark.parametrize(("images", "kept"), [(29, []), (30, [True]), (41, [True]), (42, [True, False])])
def test_hidden_states_that_fit_are_kept(images: int, kept: list[bool]) -> None:
    record = small_record()
    trainer = small_trainer("cpg", hidden_cache_bytes=images * record)
    trainer.train()
    assert [view.train for view in trainer.feature_provider._hidden._tables] == kept  # type: ignore[attr-defined]


def small_record() -> int:
    trainer = small_trainer("cpg", hidden_cache_bytes=2**30)
    trainer.feature_provider.frozen_features(train=True)
    (table,) = trainer.feature_provider._hidden._tables.values()
    return table.size


def test_hidden_states_give_the_features_of_a_whole_pass_up_to_their_rounding() -> None:
    trainer = small_trainer("cpg", hidden_cache_bytes=2**30)
    model, provider, task = trainer.model, trainer.feature_provider, trainer.stream.tasks[0]
    model.begin_task(task.classes)
    with provider.eval_mode():
        for batch in provider.task_images(task):
            kept, whole = (model.features_of(b) for b in (batch, {"pixel_values": batch["pixel_values"]}))
            assert 0 < (kept - whole).abs().max() <= 5e-3 * whole.abs().max()
    low = small_trainer("coda", hidden_cache_bytes=2**30).feature_provider
    low.frozen_features(train=True)
    assert not low._hidden._tables, "prompts enter at block 0"


def test_numbers_beyond_16_bits_are_not_kept() -> None:
    hidden = small_trainer("coda").feature_provider._hidden
    hidden.max_bytes = 2**20
    assert hidden.begin("key", torch.ones(2, 3, 4), 2)
    hidden.add("key", [0, -1], torch.ones(2, 3, 4))
    assert hidden.of("key", [0, -1]).sum() == 12
    hidden.add("key", [1], torch.full((1, 3, 4), 1e6))
    assert "key" not in hidden


def test_a_transform_that_may_draw_random_numbers_runs_in_no_other_thread() -> None:
    threads: set[int] = set()

    def drawn(image: Any) -> Tensor:
        threads.add(threading.get_ident())
        return torch.rand(3, 32, 32)

    list(picture_stream(transform=drawn).all_images(train=True, batch_size=5))
    assert threads == {threading.get_ident()}


def test_batches_are_read_one_ahead() -> None:
    """In a thread, with the same batches; an error comes at its place."""
    from cl_prompts.continual.streams.loading import Batches, build_loader, collate

    class Rows(torch.utils.data.Dataset[dict[str, Any]]):
        read: ClassVar[list[int]] = []

        def __getitem__(self, row: int) -> dict[str, Any]:
            self.read.append(row)
            if row == 5:
                raise ValueError("row 5")
            return {"pixel_values": torch.full((3, 2, 2), row), "labels": row, "sample_ids": row, "unreadable": None}

    loader: DataLoader[Any] = build_loader(Rows(), 0, batch_sampler=[[0, 1], [2, 3], [4, 5]], collate_fn=collate)
    batches = iter(Batches(loader, lambda numbers: None, ahead=True))
    assert next(batches)["labels"].tolist() == [0, 1]
    assert next(batches)["labels"].tolist() == [2, 3]
    with pytest.raises(ValueError, match="row 5"):
        next(batches)
    assert Rows.read == [0, 1, 2, 3, 4, 5]
    before = len(Rows.read)
    once = iter(Batches(loader, lambda numbers: None, ahead=True))
    next(once)
    once.close()  # type: ignore[attr-defined]
    assert len(Rows.read) <= before + 4, "no thread reads on"
