"""Data that could be misread: splits told by folders, names that differ between files, folders with numbers for names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage

from cl_prompts.continual import IterableClassIncrementalStream, IterableDomainIncrementalStream
from cl_prompts.runs.images import load_splits, load_stream


def rows_of(names: list[str], count: int) -> Dataset:
    """`count` images of each class, whose gray value is the code of the last letter of its name."""
    pixels = [PILImage.fromarray(np.full((4, 4, 3), ord(name[-1]), dtype=np.uint8)) for name in names for _ in range(count)]
    labels = [number for number in range(len(names)) for _ in range(count)]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": pixels, "label": labels}, features=features)


def to_tensor(image: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1) / 255


def parquet(folder: Path, **files: Dataset) -> str:
    for name, rows in files.items():
        path = folder / f"{name.replace('__', '/')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(path)
    return str(folder)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("words", ["{}__0000", "default__{}__0000", "data__{}-00000-of-00001", "{}"])
def test_splits_of_parquet_files_are_told_by_folders_or_names(words: str, streaming: bool, tmp_path: Path) -> None:
    """The first is how the Hub converts data sets. Merged splits would train on test images."""
    train, test = rows_of(["a", "b"], 3), rows_of(["a", "b"], 1)
    source = parquet(tmp_path / "data", **{words.format("train"): train, words.format("test"): test})
    found = load_splits(source, streaming=streaming)
    assert {name: len(list(rows)) for name, rows in found.items()} == {"train": 6, "test": 2}
    assert all(isinstance(rows, IterableDataset) == streaming for rows in found.values())


def test_folders_that_tell_no_split_are_refused(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", one__0000=rows_of(["a", "b"], 3), two__0000=rows_of(["a", "b"], 3))
    with pytest.raises(ValueError, match=r"files '0000.parquet' in several folders, whose names tell no split: name the"):
        load_stream("class", source, to_tensor, tasks=2, held_out=0.2)
    alone = parquet(tmp_path / "alone", **{"one__0000": rows_of(["a", "b"], 5), "one__0001": rows_of(["a", "b"], 5)})
    with pytest.raises(ValueError, match=r"has no split 'train', only \['0000', '0001'\]"):
        load_stream("class", alone, to_tensor, tasks=2)


def test_each_split_keeps_its_own_class_names(tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", train=rows_of(["a", "b", "c"], 2), test=rows_of(["c", "a", "b"], 1))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"different class names for one id, 0: '[ac]' and '[ac]'; give all the same"):
            load_stream(
                "class", source, to_tensor, tasks=3, streaming=streaming, train_images=[2, 2, 2] if streaming else None
            )


def test_streamed_domains_with_other_names_are_refused() -> None:
    here, there = rows_of(["a", "b"], 2), rows_of(["b", "a"], 2)
    in_order = {name: rows.to_iterable_dataset() for name, rows in (("x", here), ("y", there))}
    for train, test in (
        (in_order, {"x": here, "y": here}),
        ({"x": in_order["x"], "y": in_order["x"]}, {"x": here, "y": there}),
    ):
        with pytest.raises(ValueError, match="different class names for one id, 0: 'a' and 'b'"):
            IterableDomainIncrementalStream(train, test, [0, 1], to_tensor)
    for test in (there, in_order["y"]):
        with pytest.raises(ValueError, match="different class names for one id, 0: 'a' and 'b'"):
            IterableClassIncrementalStream(in_order["x"], test, [[0], [1]], to_tensor)
    IterableClassIncrementalStream(in_order["x"], here, [[0], [1]], to_tensor)


def test_streamed_domains_whose_columns_have_our_names(tmp_path: Path) -> None:
    sources = [parquet(tmp_path / name, train=rows_of(["a", "b"], 3), test=rows_of(["a", "b"], 1)) for name in ("x", "y")]
    stream = load_stream("domain", sources, to_tensor, streaming=True, train_images=[6, 6])
    assert [task.name for task in stream.tasks] == ["x", "y"]


@pytest.mark.parametrize("share", [-0.5, 1.0, 1.5, float("nan")])
def test_a_held_out_share_is_a_share(share: float, tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", train=rows_of(["a", "b"], 3), test=rows_of(["a", "b"], 1))
    with pytest.raises(
        ValueError, match=f"held_out={share} is a share of the training images: choose a number from 0 to below"
    ):
        load_stream("class", source, to_tensor, tasks=2, held_out=share)


@pytest.mark.parametrize(
    ("names", "order", "expected"),
    [
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1]),
        (["a", "b", "c"], ["2", "0", "1"], [2, 0, 1]),  # ids
        (["0", "1", "10", "2"], ["0", "1", "2", "10"], [0, 1, 3, 2]),  # names, in the order of folders
        (["0", "1", "2"], ["2", "1", "0"], [2, 1, 0]),
    ],
)
def test_classes_are_ordered_by_name_or_id(names: list[str], order: list[str], expected: list[int], tmp_path: Path) -> None:
    source = parquet(tmp_path / "data", train=rows_of(names, 2), test=rows_of(names, 1))
    assert load_stream("class", source, to_tensor, tasks=len(names), class_order=order).classes == expected
    with pytest.raises(ValueError, match=r"class_order .* has unknown \['x'\]"):
        load_stream("class", source, to_tensor, tasks=1, class_order=["x", *order[1:]])


def test_images_without_folders_of_classes_have_no_labels(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/stray.png", "test/a/1.png", "test/b/1.png"):
        file = tmp_path / "data" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (4, 4)).save(file)
    with pytest.raises(
        ValueError, match="there are no labels: put the images into SPLIT/CLASS/IMAGE or CLASS/IMAGE, with no"
    ):
        load_stream("class", str(tmp_path / "data"), to_tensor, tasks=2)
    with pytest.raises(ValueError, match="one data set with all domains needs --domain_column"):
        load_stream("domain", parquet(tmp_path / "one", train=rows_of(["a", "b"], 2)), to_tensor)
