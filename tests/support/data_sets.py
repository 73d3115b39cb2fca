"""Data sets of eight images in the forms in which users have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import load_dataset

from cl_prompts.continual import (
    ClassIncrementalStream,
    Stream,
)
from support.stream_data import CLASSES, encoded, pictures, to_tensor, train_batches


LABELS = [0, 1, 2, 3] * 2
IMAGES = pictures(8)
NAMES = [CLASSES[label] for label in LABELS]
BY_ID, BY_NAME = [[0, 1], [2, 3]], [["owl", "jay"], ["wren", "crow"]]
ROWS = {"image": IMAGES, "label": LABELS}


def class_stream(data: Any, tasks: Any = BY_ID, transform: Any = to_tensor, test: Any = None, **more: Any) -> Stream:
    return ClassIncrementalStream(data, data if test is None else test, tasks, transform, **more)


def seen(stream: Stream) -> list[list[tuple[str, float]]]:
    """Of each task, the class and the first pixel of each training image."""
    tasks = []
    for task in stream.tasks:
        (batch,) = train_batches(stream, task.number, 8)
        assert len(next(iter(stream.test_batches(task, 8)))["labels"])
        assert batch["labels"].dtype == torch.int64
        names = [stream.names[c] if stream.names else CLASSES[c] for c in batch["labels"].tolist()]
        tasks.append(sorted(zip(names, batch["pixel_values"][:, 0, 0, 0].tolist(), strict=True)))
    return tasks


RIGHT = [sorted((NAMES[i], to_tensor(IMAGES[i])[0, 0, 0].item()) for i in range(8) if NAMES[i] in task) for task in BY_NAME]


class Pairs(torch.utils.data.Dataset[Any]):
    """As a data set of torch, whose labels are known from its items only."""

    def __init__(self, labels: Any = LABELS, transform: Callable[[Any], Any] | None = None) -> None:
        self.known, self.transform, self.read = labels, transform, list[int]()

    def __len__(self) -> int:
        return len(self.known)

    def __getitem__(self, row: int) -> Any:
        self.read.append(row)
        return IMAGES[row] if self.transform is None else self.transform(IMAGES[row]), self.known[row]


class LikeTorchvision(Pairs):
    """As torchvision's: labels in `targets`, names in `classes`."""

    classes = tuple(CLASSES)

    @property
    def targets(self) -> Any:
        return torch.tensor(self.known)


class Folder(Pairs):
    """As torchvision's `DatasetFolder` of old versions: (file, label) in `samples`."""

    @property
    def samples(self) -> list[tuple[str, int]]:
        return [(f"{row}.png", label) for row, label in enumerate(self.known)]


class Dicts(Pairs):
    def __getitem__(self, row: int) -> dict[str, Any]:
        image, label = super().__getitem__(row)
        return {"picture": image, "kind": label}


class NoTorch:
    """Pairs by number, without a base class."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, row: int) -> Any:
        return IMAGES[row], LABELS[row]


def forms_of_images(folder: Path) -> dict[str, list[Any]]:
    for number, image in enumerate(IMAGES):
        image.save(folder / f"{number}.png")
    paths = [folder / f"{number}.png" for number in range(8)]
    return {
        "PIL": IMAGES,
        "paths": paths,
        "names of files": [str(path) for path in paths],
        "contents of files": [path.read_bytes() for path in paths],
        "cells of parquet": [encoded(image) for image in IMAGES],
        "arrays": [np.asarray(image) for image in IMAGES],
    }


def parquet(folder: Path, labels: list[Any], *, streaming: bool = True) -> Any:
    """As pandas and Spark write it: no header tells that a column of `{bytes, path}` holds images."""
    file = folder / "images.parquet"
    pd.DataFrame({"image": [encoded(image) for image in IMAGES], "label": labels}).to_parquet(file)
    return load_dataset(
        "parquet", data_files=str(file), split="train", streaming=streaming, cache_dir=str(folder / "cache")
    )
