"""Generated images with the columns of the data sets that recipes name, and a tiny backbone of twelve blocks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import ViTConfig, ViTModel

from cl_prompts.runs import MICRO_VIT


def tiny_vit(folder: Path) -> Path:
    """Twelve blocks of width 8 for images of 16 x 16."""
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    processor = json.loads((MICRO_VIT / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"size": {"height": 16, "width": 16}}))
    return folder


def rows(columns: dict[str, Any], count: int, seed: int, image_column: str = "image") -> Dataset:
    """`count` noise images with columns of values or of (feature, values)."""
    random = np.random.default_rng(seed)
    pictures = [PILImage.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(count)]
    features = Features({image_column: Image(), **{name: feature for name, (feature, _) in columns.items()}})
    return Dataset.from_dict({image_column: pictures, **{name: values for name, (_, values) in columns.items()}}, features)


def labels(classes: int, count: int) -> list[int]:
    return [row % classes for row in range(count)]


def folder_of(folder: Path, **splits: Dataset) -> str:
    folder.mkdir(parents=True)
    for name, data in splits.items():
        data.to_parquet(str(folder / f"{name}.parquet"))
    return str(folder)


def ids(classes: int, count: int) -> tuple[Any, list[int]]:
    """A column of class ids with names."""
    return ClassLabel(names=[f"class {c}" for c in range(classes)]), labels(classes, count)


def texts(names: list[str], count: int) -> tuple[Any, list[str]]:
    """A column of strings."""
    return Value("string"), [names[row % len(names)] for row in range(count)]


def generated(folder: Path) -> dict[str, str]:
    """Folders by the Hub id (or local folder) that a recipe names. Every class has four training images."""
    found = {}

    def add(name: str, classes: int, test: int = 1, image_column: str = "image", **more: Any) -> None:
        parts = {}
        for number, (split, each) in enumerate((("train", 4), ("test", test))):
            count = each * classes
            columns = {key: make(count) for key, make in more.items()}
            parts[split] = rows(columns, count, number, image_column)
        found[name] = folder_of(folder / name.replace("/", "-").replace(":", "-"), **parts)

    add("uoft-cs/cifar100", 40, image_column="img", fine_label=lambda n: ids(40, n), coarse_label=lambda n: ids(5, n))
    add("bentrevett/caltech-ucsd-birds-200-2011", 20, label=lambda n: ids(20, n))
    add("ufldl-stanford/svhn:cropped_digits", 4, label=lambda n: ids(4, n))
    add("ylecun/mnist", 4, label=lambda n: ids(4, n))
    add("uoft-cs/cifar10", 4, image_column="img", label=lambda n: ids(4, n))
    add("anubhavmaity/notMNIST", 4, label=lambda n: texts(list("ABCD"), n))
    add("zalando-datasets/fashion_mnist", 4, label=lambda n: ids(4, n))
    add("wltjr1007/DomainNet", 10, label=lambda n: ids(10, n), domain=lambda n: ids(2, n))
    add("data/imagenet-a", 20, label=lambda n: ids(20, n))
    add("data/vtab", 10, label=lambda n: ids(10, n))
    names = [f"n{number:08d}" for number in range(40)]  # two classes a task where there are 20
    count = 5 * len(names)
    one = rows({"wnid": texts(names, count), "class_name": texts([f"thing {n}" for n in names], count)}, count, 5)
    found["axiong/imagenet-r"] = folder_of(folder / "imagenet-r", test=one)
    sessions = ["1", "2", "4", "5", "6", "8", "9", "11"]
    train = rows({"label": ids(3, 96), "session": (Value("string"), [sessions[row // 12] for row in range(96)])}, 96, 6)
    test = rows({"label": ids(3, 6), "session": texts(["3", "7", "10"], 6)}, 6, 7)
    found["adrake17/core50"] = folder_of(folder / "core50", train=train, test=test)
    return found
