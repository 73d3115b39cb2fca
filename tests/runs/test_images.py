"""The example's sources: a stream of every scenario from plain settings, and small data sets made of large ones."""

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset
from support.paths import EXAMPLES
from support.stream_data import birds, encoded, pictures, to_tensor
from transformers import AutoImageProcessor

from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    DatasetSequenceStream,
    DomainIncrementalStream,
    GaussianStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
)


sys.path.insert(0, str(EXAMPLES))

import make_mini

from cl_prompts.runs import MICRO_VIT
from cl_prompts.runs.images import ToTensor, load_stream


LABELS = [0, 1, 2, 3] * 6
DOMAIN = [0] * 8 + [1] * 8 + [2] * 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def folder_of(folder: Path, train: Dataset, test: Dataset) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    train.to_parquet(str(folder / "train.parquet"))
    test.to_parquet(str(folder / "test.parquet"))
    return str(folder)


def test_new_classes(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "birds", birds(LABELS), birds(LABELS[:8]))
    stream = load_stream("class", source, to_tensor, tasks=[1, 3], class_order=["seed"], seed=3)
    assert isinstance(stream, ClassIncrementalStream)
    assert [len(task.classes) for task in stream] == [1, 3]
    assert stream.classes == load_stream("class", source, to_tensor, tasks=2, class_order=["seed"], seed=3).classes
    assert stream.classes != [0, 1, 2, 3]
    assert load_stream("class", source, to_tensor, tasks=2).classes == [0, 1, 2, 3]
    held = load_stream("class", source, to_tensor, tasks=2, held_out=1 / 3, augmentation=CropAndFlip(), on_bad_image="skip")
    assert [(len(task.train_rows), len(task.test_rows)) for task in held] == [(8, 4), (8, 4)]
    assert held.augmentation is not None
    assert held.on_bad_image == "skip"
    gaussian = load_stream("gaussian", source, to_tensor, width=0.2, seed=1)
    assert isinstance(gaussian, GaussianStream)
    assert (gaussian.width, gaussian.seed) == (0.2, 1)


def test_new_domains(tmp_path: Path) -> None:
    data = birds(LABELS, domains=DOMAIN)
    source = folder_of(tmp_path / "birds", data, data)
    stream = load_stream("domain", source, to_tensor, domain_column="domain", order=["cartoon", "photo"])
    assert isinstance(stream, DomainIncrementalStream)
    assert [task.name for task in stream] == ["cartoon", "photo"]
    held = load_stream("domain", source, to_tensor, domain_column="domain", held_out=0.5)
    assert [(len(task.train_rows), len(task.test_rows)) for task in held] == [(4, 4)] * 3, "half of each class and domain"
    for name in ("night", "day"):
        folder_of(tmp_path / "times" / name, birds(LABELS), birds(LABELS))
    by_folder = load_stream("domain", str(tmp_path / "times"), to_tensor)
    assert [task.name for task in by_folder] == ["day", "night"]
    listed = load_stream(
        "domain", [str(tmp_path / "times" / name) for name in ("night", "day")], to_tensor, common_test=True
    )
    assert [task.name for task in listed] == ["night", "day"]
    assert all(task.test_rows.tolist() == list(range(24)) for task in listed)


def test_data_sets_in_a_row(tmp_path: Path) -> None:
    folder_of(tmp_path / "sets" / "a", birds(LABELS), birds(LABELS))
    other = birds(LABELS).rename_columns({"image": "img", "label": "kind"})
    folder_of(tmp_path / "sets" / "b", other, other)
    stream = load_stream("datasets", str(tmp_path / "sets"), to_tensor, order=["b", "a"])
    assert isinstance(stream, DatasetSequenceStream)
    assert [(task.name, task.classes) for task in stream] == [("b", [0, 1, 2, 3]), ("a", [4, 5, 6, 7])]
    assert len(next(iter(stream.train_batches(stream.tasks[1], 4, seed=0, epoch=0)))["labels"]) == 4
    with pytest.raises(ValueError, match=r"order names \['c'\], there are \['a', 'b'\]"):
        load_stream("datasets", str(tmp_path / "sets"), to_tensor, order=["c"])


def test_streamed(tmp_path: Path) -> None:
    data = birds(LABELS, domains=DOMAIN)
    source = folder_of(tmp_path / "birds", data, data)
    classes = load_stream("class", source, to_tensor, label_column="label", tasks=2, streaming=True, train_images=[12, 12])
    assert isinstance(classes, IterableClassIncrementalStream)
    assert classes.classes == [0, 1, 2, 3]
    assert classes.steps_per_epoch(classes.tasks[0], 5) == 3
    domains = load_stream("domain", source, to_tensor, domain_column="domain", order=["photo", "sketch"], streaming=True)
    assert isinstance(domains, IterableDomainIncrementalStream)
    for stream in (classes, domains):
        labels = [
            c for batch in stream.train_batches(stream.tasks[1], 5, seed=0, epoch=0) for c in batch["labels"].tolist()
        ]
        assert sorted(set(labels)) == stream.tasks[1].classes
    for arguments in ({"scenario": "gaussian"}, {"scenario": "class", "held_out": 0.1}, {"scenario": "datasets"}):
        with pytest.raises(ValueError, match="only class and domain can be streamed"):
            load_stream(**arguments, sources=source, transform=to_tensor, streaming=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [LABELS, [["owl", "jay", "wren", "crow"][label] for label in LABELS]])
def test_parquet_without_a_header(labels: list[Any], tmp_path: Path) -> None:
    """As pandas and Spark write it: images are `{bytes, path}`, and labels may be names."""
    (tmp_path / "birds").mkdir()
    frame = pd.DataFrame({"image": [encoded(image) for image in pictures(len(labels))], "label": labels})
    for split in ("train", "test"):
        frame.to_parquet(tmp_path / "birds" / f"{split}.parquet")
    source = str(tmp_path / "birds")
    for more in ({}, {"held_out": 0.5}, {"streaming": True}):
        stream = load_stream("class", source, to_tensor, tasks=2, **more)  # type: ignore[arg-type]
        assert stream.classes == [0, 1, 2, 3]
        assert list(stream.names.values()) == (sorted(set(labels)) if labels is not LABELS else [])
        for task in stream.tasks:
            images = [c for b in stream.train_batches(task, 5, seed=0, epoch=0) for c in b["labels"].tolist()]
            assert sorted(images) == sorted(task.classes * (3 if "held_out" in more else 6))


def test_a_label_is_missing(tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    labels = ["owl", "owl", None, "jay", "jay"]
    frame = pd.DataFrame({"image": [encoded(image) for image in pictures(5)], "label": labels})
    frame.to_parquet(tmp_path / "birds" / "train.parquet")
    for more in ({"held_out": 0.5}, {"held_out": 0.5, "label_column": "label"}):
        with pytest.raises(ValueError, match=r"holds None in row \d, which is no class id: leave such rows out"):
            load_stream("class", str(tmp_path / "birds"), to_tensor, tasks=2, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train"], r"has only the splits \['train'\]: add a test split, or use --held_out 0\.2"),
        (["test"], r"has no split 'train', only \['test'\]: add one or, with a single split, use --held_out 0\.2"),
        (["test", "validation"], r"has no split 'train', only \['test', 'validation'\]: add one"),
    ],
)
def test_a_split_is_missing(splits: list[str], message: str, tmp_path: Path) -> None:
    for split in splits:
        birds(LABELS).to_parquet(str(tmp_path / f"{split}.parquet"))
    with pytest.raises(ValueError, match=message):
        load_stream("class", str(tmp_path), to_tensor, tasks=2)
    if len(splits) == 1:
        stream = load_stream("class", str(tmp_path), to_tensor, tasks=2, held_out=0.5)
        assert isinstance(stream, ClassIncrementalStream)
        assert [(len(task.train_rows), len(task.test_rows)) for task in stream] == [(6, 6), (6, 6)]


@pytest.mark.parametrize("split", ["val", "dev", "valid"])
def test_other_names_of_a_test_split(split: str, tmp_path: Path) -> None:
    for name, seed in (("train", 0), (split, 1)):
        birds(LABELS, seed).to_parquet(str(tmp_path / f"{name}.parquet"))
    stream = load_stream("class", str(tmp_path), to_tensor, tasks=2)
    assert isinstance(stream, ClassIncrementalStream)
    assert len(stream.test_labels) == len(LABELS)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    few = birds([0, 1, 2, 2])
    few.to_parquet(str(tmp_path / "train.parquet"))
    with pytest.raises(ValueError, match=r"held_out=0.5 leaves no training image of .*0}: there are 1, add some"):
        load_stream("class", str(tmp_path), to_tensor, tasks=2, held_out=0.5)
    for more in ({"label_column": "fine"}, {"label_column": "fine", "streaming": True}, {"image_column": "fine"}):
        birds(LABELS).to_parquet(str(tmp_path / "test.parquet"))
        with pytest.raises(ValueError, match="the training set has no column 'fine', its columns are"):
            load_stream("class", str(tmp_path), to_tensor, tasks=2, **more)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"train\.parquet is a file: name its folder"):
        load_stream("class", str(tmp_path / "train.parquet"), to_tensor, tasks=2)


def test_settings_that_do_not_fit(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "birds", birds(LABELS), birds(LABELS))
    with pytest.raises(ValueError, match="scenario='task': choose one of class, domain, datasets, gaussian"):
        load_stream("task", source, to_tensor)
    with pytest.raises(ValueError, match=r"scenario 'class' takes one data set, got \['birds', 'more'\]"):
        load_stream("class", [source, str(tmp_path / "more")], to_tensor)
    with pytest.raises(ValueError, match="no two with the same last part"):
        load_stream("datasets", [source, source], to_tensor)


def test_the_transform_can_be_sent_to_a_fresh_process() -> None:
    processor = AutoImageProcessor.from_pretrained(MICRO_VIT)
    there = pickle.loads(pickle.dumps(ToTensor(processor, "unit", "bicubic")))
    image = pictures(1, size=(20, 20))[0]
    assert there(image).equal(ToTensor(processor, "unit", "bicubic")(image))
    with pytest.raises(ValueError, match="input_range='0-1': choose processor or unit"):
        ToTensor(processor, "0-1")


# ---- make_mini -----------------------------------------------------------------------------------------------------


def cifar_like(folder: Path, each: int = 5) -> tuple[str, list[Any], list[int]]:
    """Columns as in uoft-cs/cifar100; images of three classes in a random order."""
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], each)).tolist()
    images = pictures(len(labels), size=(32, 32))
    names = Features(
        {"img": Image(), "fine_label": ClassLabel(names=["apple", "bear", "cup"]), "coarse_label": Value("int64")}
    )
    columns = {"img": [encoded(i) for i in images], "fine_label": labels, "coarse_label": [0] * len(labels)}
    rows = Dataset.from_dict(columns, features=names)
    return folder_of(folder, rows, rows), images, labels


@pytest.mark.parametrize("classes", [3, 2])
def test_a_small_set_holds_the_first_images_of_each_class(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, images, labels = cifar_like(tmp_path / "large")
    output = tmp_path / "small"
    line = ["make_mini.py", "--source", source, "--output", str(output), "--train", "3", "--test", "2"]
    line += ["--classes", str(classes)] if classes < 3 else []
    monkeypatch.setattr(sys, "argv", [*line, "--label_column", "fine_label"])
    make_mini.main()
    printed = capsys.readouterr().out
    files = {split: str(output / f"{split}.parquet") for split in ("train", "test")}
    made = load_dataset("parquet", data_files=files)
    for split, count in (("train", 3), ("test", 2)):
        expected = [row for row, label in enumerate(labels) if labels[:row].count(label) < count and label < classes]
        assert made[split].column_names == ["img", "fine_label"]
        assert made[split]["fine_label"][:] == [labels[row] for row in expected]
        assert made[split].features["fine_label"].names == ["apple", "bear", "cup"][:classes]
        pixels = [np.asarray(images[row]) for row in expected]
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(made[split]["img"], pixels, strict=True))
        told = b"".join(f"{labels[r]} (32, 32, 3) ".encode() + p.tobytes() for r, p in zip(expected, pixels, strict=True))
        assert f"{split}: {classes * count} images, sha256 {hashlib.sha256(told).hexdigest()}" in printed
    stream = load_stream("class", str(output), to_tensor, tasks=classes)
    assert [len(task.train_rows) for task in stream] == [3] * classes
    with pytest.raises(ValueError, match="small exists: choose another folder, nothing is overwritten"):
        make_mini.main()


def test_a_small_set_of_image_folders_needs_them_no_longer(tmp_path: Path) -> None:
    for number, picture in enumerate(pictures(8)):
        folder = tmp_path / "large" / ("train" if number < 4 else "test") / ("owl" if number % 2 else "jay")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png")
    make_mini.make(str(tmp_path / "large"), tmp_path / "small", 1, 1, None, None)
    cells = load_dataset("parquet", data_files=str(tmp_path / "small" / "train.parquet"), split="train")
    assert [cell["path"] for cell in cells.cast_column("image", Image(decode=False))["image"]] == [None, None]


def test_a_class_with_too_few_images(tmp_path: Path) -> None:
    source, _, _ = cifar_like(tmp_path / "large")
    with pytest.raises(ValueError, match="class 0 has 5 images, not 6: ask for fewer"):
        make_mini.make(source, tmp_path / "small", 6, 1, None, "fine_label")
    assert not (tmp_path / "small").exists()
