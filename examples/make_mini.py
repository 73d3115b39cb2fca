"""Make a small data set from a large one: the first images of each class, in the order of the source.

    python examples/make_mini.py --output cifar100-mini     # 100 training and 20 test images per class of CIFAR-100
    python examples/make_mini.py --output cifar20-mini --classes 20    # of its first twenty classes

The choice is not random, so the same source gives the same images; compare the printed sha256 (over labels and pixels, in
order). The tables in docs/results.md were measured on a random draw of the same size, with other images. On 2,000 test
images, differences below two points are not significant.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from cl_prompts.runs.images import load_image_data
from cl_prompts.runtime.images import read_rgb
from cl_prompts.storage.staging import staging_folder


def first_of_each(rows: Dataset, label_column: str, count: int, classes: int | None = None) -> Dataset:
    """The first `count` rows of each of the first `classes` classes (default: all), in the order of `rows`.

    Raises:
        ValueError: a class has fewer rows.
    """
    labels = np.asarray(rows[label_column])
    chosen = []
    for label in np.unique(labels)[:classes]:
        of_class = np.flatnonzero(labels == label)
        if len(of_class) < count:
            raise ValueError(f"class {label} has {len(of_class)} images, not {count}: ask for fewer")
        chosen.append(of_class[:count])
    few = rows.select(np.sort(np.concatenate(chosen)))
    feature = few.features[label_column]
    if classes is None or not isinstance(feature, ClassLabel):
        return few
    return few.cast_column(label_column, Value("int64")).cast_column(
        label_column, ClassLabel(names=feature.names[:classes])
    )


def self_contained(rows: Dataset, image_column: str, label_column: str) -> Dataset:
    """Image and label columns only, with the unchanged bytes of the image files and without their paths."""
    cells = rows.cast_column(image_column, Image(decode=False))[image_column]
    files = [{"bytes": cell["bytes"] or Path(cell["path"]).read_bytes(), "path": None} for cell in cells]
    features = Features({image_column: Image(), label_column: rows.features[label_column]})
    return Dataset.from_dict({image_column: files, label_column: rows[label_column][:]}, features=features)


def digest(rows: Dataset, image_column: str, label_column: str) -> str:
    """Sha256 over label, size and RGB pixels of each image, in order."""
    sha256 = hashlib.sha256()
    for row in rows.cast_column(image_column, Image(decode=False)):
        pixels: Any = np.asarray(read_rgb(row[image_column]["bytes"]))
        sha256.update(f"{row[label_column]} {pixels.shape} ".encode())
        sha256.update(pixels.tobytes())
    return sha256.hexdigest()


def make(
    source: str,
    output: Path,
    train: int,
    test: int,
    image_column: str | None,
    label_column: str | None,
    classes: int | None = None,
) -> None:
    """Write `train.parquet` and `test.parquet` into a new folder.

    Raises:
        ValueError: the folder exists, a column cannot be determined, or a class has too few images.
    """
    if output.exists():
        raise ValueError(f"{output} exists: choose another folder, nothing is overwritten")
    data = load_image_data(source, image_column, label_column, 0, 0)
    columns = data.image_column, data.label_column
    parts = {"train": (data.train, train), "test": (data.test, test)}
    small = {
        split: self_contained(first_of_each(rows, data.label_column, count, classes), *columns)
        for split, (rows, count) in parts.items()
    }
    with staging_folder(output) as folder:
        for split, rows in small.items():
            rows.to_parquet(str(folder / f"{split}.parquet"))
    for split, rows in small.items():
        print(f"{split}: {len(rows)} images, sha256 {digest(rows, *columns)}")


def main() -> None:
    """Read the command line and write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="uoft-cs/cifar100", help="Hub id or folder with training and test images")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--train", type=int, default=100, help="training images a class")
    parser.add_argument("--test", type=int, default=20, help="test images a class")
    parser.add_argument("--classes", type=int, help="the first ones only")
    parser.add_argument("--image_column", help="default: the only one")
    parser.add_argument("--label_column", help="default: fine_label for CIFAR-100, else the only one")
    args = parser.parse_args()
    if args.label_column is None and args.source == parser.get_default("source"):
        args.label_column = "fine_label"  # CIFAR-100 also has coarse labels
    make(args.source, args.output, args.train, args.test, args.image_column, args.label_column, args.classes)


if __name__ == "__main__":
    main()
