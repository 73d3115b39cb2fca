"""Images to learn from: scikit-learn's digits, a Hub data set, a folder of parquet files, or a folder of image folders."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from PIL import Image as PILImage


@dataclass
class ImageData:
    """A training and a test set, and where images and labels stand in them."""

    train: Dataset
    test: Dataset
    image_column: str
    label_column: str

    @property
    def classes(self) -> list[int]:
        """Class ids of the training set, ascending."""
        return sorted(set(self.train[self.label_column]))

    def names(self, classes: list[int]) -> dict[int, str]:
        """Class names, where the data set knows them."""
        label = self.train.features[self.label_column]
        return {c: label.int2str(c) for c in classes} if isinstance(label, ClassLabel) else {}

    def transform(self, processor: Any, input_range: str, resample: str) -> Callable[[Any], torch.Tensor]:
        """Image -> [3, H, W] through the model's image processor; grey images become RGB first."""
        options: dict[str, Any] = {}
        if input_range == "unit":
            options["do_normalize"] = False
        elif input_range != "processor":
            raise ValueError(f"input_range={input_range!r}: choose processor or unit")
        if resample != "processor":
            options["resample"] = PILImage.Resampling[resample.upper()]

        def to_tensor(image: Any) -> torch.Tensor:
            return processor(image.convert("RGB"), return_tensors="pt", **options)["pixel_values"][0]

        return to_tensor


def load_image_data(
    source: str, image_column: str | None, label_column: str | None, held_out: float, seed: int
) -> ImageData:
    """Load training and test images.

    Args:
        source: "digits", a folder, or a Hub id.
        image_column, label_column: column names; None: found by their types.
        held_out: if positive, the test set is this share of the training images of each class, and the real test set is
            not touched.
        seed: chooses the held-out images.
    """
    splits = digits() if source == "digits" else load_splits(source)
    train = splits["train"]
    image_column = image_column or only_column(train.features, "image", lambda f: isinstance(f, Image))
    label_column = label_column or only_column(
        train.features, "label", lambda f: isinstance(f, ClassLabel) or (isinstance(f, Value) and "int" in f.dtype)
    )
    if held_out:
        train, test = split_by_class(train, label_column, held_out, seed)
    else:
        name = next((n for n in ("test", "validation") if n in splits), None)
        if name is None:
            raise ValueError(f"{source} has only the splits {sorted(splits)}: add a test split, or use --held_out 0.2")
        test = splits[name]
    return ImageData(train, test, image_column, label_column)


def load_splits(source: str) -> DatasetDict:
    """All splits of a folder or a Hub data set."""
    folder = Path(source)
    if not folder.exists():
        return load_dataset(source)
    files = sorted(folder.rglob("*.parquet"))
    if not files:
        return load_dataset("imagefolder", data_dir=source)
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(file.stem.split("-")[0], []).append(str(file))
    return load_dataset("parquet", data_files=by_split)


def only_column(features: Features, kind: str, fits: Callable[[Any], bool]) -> str:
    """The one column of a kind."""
    names = [name for name, feature in features.items() if fits(feature)]
    if len(names) != 1:
        raise ValueError(f"cannot tell the {kind} column among {sorted(features)}: pass --{kind}_column")
    return names[0]


def split_by_class(rows: Dataset, label_column: str, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows, the same share of every class."""
    labels = np.asarray(rows[label_column])
    random = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        of_class = random.permutation(np.flatnonzero(labels == c))
        held[of_class[: max(1, round(share * len(of_class)))]] = True
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def digits() -> DatasetDict:
    """scikit-learn's handwritten digits: 1,797 real grey images of 8x8 pixels; a fifth of each class is the test set."""
    from sklearn.datasets import load_digits  # only this data set needs it

    bunch = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in bunch.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    rows = Dataset.from_dict({"image": images, "label": bunch.target.tolist()}, features=features)
    train, test = split_by_class(rows, "label", 0.2, seed=0)
    return DatasetDict(train=train, test=test)
