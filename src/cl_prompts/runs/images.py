"""Loading image data sets, and streams of them.

Sources are scikit-learn's digits, single or in a row, Hub data sets, folders of parquet files, and folders of image
folders.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage

from cl_prompts.continual import (
    ClassIncrementalStream,
    CropAndFlip,
    DatasetSequenceStream,
    DomainIncrementalStream,
    GaussianStream,
    IterableClassIncrementalStream,
    IterableDomainIncrementalStream,
    Stream,
)
from cl_prompts.continual.streams.data_sets import holds_files, is_missing
from cl_prompts.continual.streams.transforms import ProcessorTransform
from cl_prompts.runs.class_order import ordered_classes, tasks_in_order
from cl_prompts.runs.digit_rows import numbers
from cl_prompts.runs.image_folders import SPLITS, OtherLayoutError, read_image_folder


TEST_SPLITS = ("test", "validation", "valid", "val", "dev")  # in the order of choice
Scenario = Literal["class", "domain", "datasets", "gaussian"]
SCENARIOS: tuple[str, ...] = get_args(Scenario)
InputRange = Literal["processor", "unit"]
Resample = Literal["processor", "bilinear", "bicubic"]
OnBadImage = Literal["stop", "skip"]


class ToTensor(ProcessorTransform):
    """Transform: PIL image -> [3, H, W], with the model's image processor. Images are made 8-bit RGB first.

    Args:
        processor: the model's image processor.
        input_range: "processor" (its mean and standard deviation) or "unit" (values in [0, 1]).
        resample: "processor" (its own), or "bilinear", "bicubic", ...
    """

    def __init__(self, processor: Any, input_range: str = "processor", resample: str = "processor") -> None:
        options: dict[str, Any] = {}
        if input_range == "unit":
            options["do_normalize"] = False
        elif input_range != "processor":
            raise ValueError(f"input_range={input_range!r}: choose processor or unit")
        if resample != "processor":
            options["resample"] = PILImage.Resampling[resample.upper()]
        if fixed := [name for name in options if getattr(processor, name, None) is None]:
            raise ValueError(
                f"the image processor of the model, a {type(processor).__name__}, has no {fixed[0]} to change: leave "
                "input_range and resample at their defaults, processor"
            )
        super().__init__(processor, **options)


@dataclass
class ImageData:
    """A training and a test set, with the names of their image and label columns."""

    train: Any
    test: Any
    image_column: str
    label_column: str

    @property
    def classes(self) -> list[Any]:
        """Class ids of the training set, or class names if the labels are strings.

        While streaming, those of the label column's ClassLabel; without one, a pass over that column lists them.
        """
        label = (self.train.features or {}).get(self.label_column)
        if isinstance(self.train, IterableDataset):
            if isinstance(label, ClassLabel):
                return list(range(label.num_classes))
            values = [row[self.label_column] for row in self.train.select_columns([self.label_column])]
        else:
            values = self.train[self.label_column][:]
        return sorted({value for value in values if value is not None})

    def names(self, classes: list[Any]) -> dict[int, str]:
        """Names of classes by id; empty if the data set has none."""
        label = (self.train.features or {}).get(self.label_column)
        known = dict(enumerate(label.names)) if isinstance(label, ClassLabel) else {}
        return {c: known[c] for c in classes if c in known}

    def transform(self, processor: Any, input_range: str, resample: str) -> ToTensor:
        """The transform for these images."""
        return ToTensor(processor, input_range, resample)

    def renamed(self, image_column: str, label_column: str) -> ImageData:
        """The same data with these column names, without other columns."""
        names = {self.image_column: image_column, self.label_column: label_column}
        other = {old: new for old, new in names.items() if old != new}  # an IterableDataset refuses a column's own name
        train, test = (part.select_columns(list(names)) for part in (self.train, self.test))
        if other:
            train, test = train.rename_columns(other), test.rename_columns(other)
        return ImageData(train, test, image_column, label_column)


def load_stream(
    scenario: str,
    sources: str | Sequence[str],
    transform: Callable[[Any], torch.Tensor],
    *,
    tasks: int | Sequence[int] = 10,
    class_order: Sequence[str] = ("natural",),
    seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    domain_column: str | None = None,
    order: Sequence[str] | None = None,
    common_test: bool = False,
    width: float = 0.05,
    parts: int = 1,
    held_out: float = 0.0,
    augmentation: CropAndFlip | None = None,
    on_bad_image: str = "stop",
    streaming: bool = False,
    train_images: Sequence[int] | None = None,
) -> Stream:
    """Build a stream from settings.

    Args:
        scenario: "class" (new classes), "domain" (new domains of the same classes), "datasets" (several data sets in a row)
            or "gaussian" (classes come and go; no tasks, or `parts`).
        sources: "numbers", "digits", folders or Hub ids: one for "class" and "gaussian"; for "domain", one with a domain
            column or one per domain; for "datasets", one per data set. A single folder means the data sets in its
            subfolders. The name of a domain or data set is the last part of its path.
        transform: image -> float tensor [3, H, W].
        tasks: number of tasks, or number of classes of each task; for "class".
        class_order: see `ordered_classes`; for "class" and "gaussian".
        seed: seed of the class order, the Gaussian schedule and the held-out images.
        image_column, label_column: column names; None: found by type.
        domain_column: name of the domain column, if one data set has all domains.
        order: names of the domains or data sets in order; None: the order of the sources.
        common_test: test all domains on one test set, the first.
        width: standard deviation of the Gaussians, as a share of the stream.
        parts: of a `GaussianStream`.
        held_out: if positive, test on this share of the training images of each class (and domain).
        augmentation, on_bad_image: see `Stream`.
        streaming: read the sources in order instead of loading them; for "class" and "domain".
        train_images: number of training images of each task, if it is known while streaming.

    Raises:
        ValueError: settings do not fit each other or the data.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"scenario={scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out} is a share of the training images: choose a number from 0 to below 1")
    if streaming and (scenario in ("datasets", "gaussian") or held_out):
        raise ValueError(f"scenario {scenario!r}, held_out={held_out}: only class and domain can be streamed, whole")
    several = scenario == "datasets" or (scenario == "domain" and domain_column is None)
    named = named_sources([sources] if isinstance(sources, str) else sources, inside=several)
    if not several and len(named) != 1:
        raise ValueError(
            f"scenario {scenario!r} takes one data set, got {list(named)}; several domains may lack --domain_column"
        )
    others = [domain_column] if domain_column is not None else []
    data = {
        name: load_image_data(source, image_column, label_column, held_out, seed, others=others, streaming=streaming)
        for name, source in named.items()
    }
    shared: dict[str, Any] = {"augmentation": augmentation, "on_bad_image": on_bad_image}
    if several:
        if order is not None and (unknown := sorted(set(order) - set(data))):
            raise ValueError(f"order names {unknown}, there are {sorted(data)}")
        renamed = {name: data[name].renamed("image", "label") for name in (data if order is None else order)}
        train: Any = {name: part.train for name, part in renamed.items()}
        test: Any = {name: part.test for name, part in renamed.items()}
        if scenario == "datasets":
            return DatasetSequenceStream(train, test, transform, **shared)
        if streaming:
            classes = next(iter(renamed.values())).classes
            return IterableDomainIncrementalStream(train, test, classes, transform, train_images=train_images, **shared)
        if common_test:
            test = next(iter(test.values()))
        return DomainIncrementalStream(train, test, transform, common_test=common_test, **shared)
    (one,) = data.values()
    shared |= {"image_column": one.image_column, "label_column": one.label_column}
    if scenario == "domain":
        shared |= {"domains": order, "domain_column": domain_column}
        if streaming:
            shared["train_images"] = train_images
            return IterableDomainIncrementalStream(one.train, one.test, one.classes, transform, **shared)
        return DomainIncrementalStream(one.train, one.test, transform, common_test=common_test, **shared)
    classes = one.classes
    names = one.names(classes)
    if scenario == "gaussian":
        ordered = ordered_classes(classes, class_order, seed, names)
        shared |= {"width": width, "seed": seed, "parts": parts}
        return GaussianStream(one.train, one.test, transform, classes=ordered, **shared)
    split = tasks_in_order(classes, tasks, class_order, seed, names)
    if streaming:
        shared["train_images"] = train_images
        return IterableClassIncrementalStream(one.train, one.test, split, transform, **shared)
    return ClassIncrementalStream(one.train, one.test, split, transform, **shared)


def named_sources(sources: Sequence[str], *, inside: bool) -> dict[str, str]:
    """Sources by the last part of their path. With `inside`, a single folder means its subfolders."""
    if inside and len(sources) == 1 and Path(sources[0]).is_dir():
        sources = sorted(str(folder) for folder in Path(sources[0]).iterdir() if folder.is_dir())
    named = {Path(source).name: source for source in sources}
    if len(named) < len(sources) or not named:
        raise ValueError(
            f"sources {list(sources)}: give at least one folder or Hub id for each domain or data set, and no two with the "
            "same last part; one data set with all domains needs --domain_column"
        )
    return named


def load_image_data(
    source: str,
    image_column: str | None,
    label_column: str | None,
    held_out: float,
    seed: int,
    *,
    others: Sequence[str] = (),
    streaming: bool = False,
) -> ImageData:
    """Load training and test images.

    Args:
        source: "numbers", "digits", a folder, or a Hub id, with ":" and its configuration where it has several.
        image_column, label_column: column names; None: found by type.
        held_out: if positive, the test set is this share of the training images of each class, and the real test set is
            not used. A data set with a single split, of any name, can be used so.
        seed: seed of the held-out images.
        others: columns that are not labels, like the domain; held-out images are drawn for each of their values too.
        streaming: return data sets that are read in order.
    """
    splits = EMBEDDED[source]() if source in EMBEDDED else load_splits(source, streaming=streaming)
    single = held_out and len(splits) == 1
    if "train" not in splits and not single:
        raise ValueError(
            f"{source} has no split 'train', only {sorted(splits)}: add one or, with a single split, use --held_out 0.2"
        )
    train = next(iter(splits.values())) if single else splits["train"]
    features = {name: feature for name, feature in (train.features or {}).items() if name not in others}
    image_column = image_column or only_column(features, "image", holds_files)
    features.pop(image_column, None)
    label_column = label_column or only_column(
        features, "label", holds_ids if any(map(holds_ids, features.values())) else holds_names
    )
    if held_out:
        train, test = split_by_class(train, [label_column, *others], held_out, seed)
    else:
        name = next((n for n in TEST_SPLITS if n in splits), None)
        if name is None:
            raise ValueError(f"{source} has only the splits {sorted(splits)}: add a test split, or use --held_out 0.2")
        test = splits[name]
    named = (("image", image_column), ("label", label_column), *(("domain", name) for name in others))
    for split, rows in (("training", train), ("test", test)):
        for kind, name in named:
            if rows.column_names is not None and name not in rows.column_names:
                raise ValueError(
                    f"{source}: the {split} set has no column {name!r}, its columns are {sorted(rows.column_names)}: pass "
                    f"--{kind}_column"
                )
    return ImageData(train, test, image_column, label_column)


def load_splits(source: str, *, streaming: bool = False) -> Any:
    """All splits of a folder or of a Hub data set, "name" or "name:configuration"."""
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file: name its folder")
    if not folder.exists():
        name, _, configuration = source.partition(":")
        return load_dataset(name, configuration or None, streaming=streaming)
    try:
        splits = read_image_folder(source)
        return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits
    except OtherLayoutError:
        files = sorted(folder.rglob("*.parquet"))
    if not files:
        return load_dataset("imagefolder", data_dir=source, streaming=streaming)
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    for split, parts in by_split.items():
        if split not in SPLITS and len({part.parent for part in parts}) > 1:
            raise ValueError(
                f"{source} has files {parts[0].name!r} in several folders, whose names tell no split: name the folders or "
                "the files train and test"
            )
    # One after the other: a single call would give all splits the class names of the first.
    return {
        split: load_dataset("parquet", data_files={split: [str(part) for part in parts]}, split=split, streaming=streaming)
        for split, parts in by_split.items()
    }


def _split_of(file: Path) -> str:
    """The split of a parquet file: of the last folder that names one, else the first word of the file's own name."""
    named = [SPLITS[part.lower()] for part in file.parent.parts if part.lower() in SPLITS]
    return named[-1] if named else file.stem.split("-")[0]


def only_column(features: dict[str, Any], kind: str, fits: Callable[[Any], bool]) -> str:
    """The name of the only column that `fits`. Raises ValueError if there is not exactly one."""
    names = [name for name, feature in features.items() if fits(feature)]
    if kind == "label" and not features:
        raise ValueError(
            "there are no labels: put the images into SPLIT/CLASS/IMAGE or CLASS/IMAGE, with no other files beside these "
            "folders"
        )
    if len(names) != 1:
        raise ValueError(f"cannot tell the {kind} column among {sorted(features)}: pass --{kind}_column")
    return names[0]


def holds_ids(feature: Any) -> bool:
    """Whether a column holds class ids."""
    whole = isinstance(feature, Value) and ("int" in feature.dtype or feature.dtype == "bool")
    return isinstance(feature, ClassLabel) or whole


def holds_names(feature: Any) -> bool:
    """Whether a column holds strings, which may be class names."""
    return isinstance(feature, Value) and "string" in feature.dtype


def split_by_class(rows: Dataset, columns: str | Sequence[str], share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training rows and held-out rows: the same `share` of each class, or of each combination of values of `columns`."""
    names = [columns] if isinstance(columns, str) else columns
    columns_of_values = [np.asarray(rows[name]) for name in names]
    columns_of_values = [v.astype(str) if v.dtype == object else v for v in columns_of_values]  # None has no order
    values = np.stack([np.unique(column, return_inverse=True)[1] for column in columns_of_values], axis=1)
    groups = np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    random = np.random.default_rng(seed)
    held = np.zeros(len(groups), dtype=bool)
    for group in np.unique(groups):
        of_group = random.permutation(np.flatnonzero(groups == group))
        count = max(1, round(share * len(of_group)))
        row = {name: rows[name][int(of_group[0])] for name in names}
        if count == len(of_group) and not any(map(is_missing, row.values())):  # the stream refuses missing labels
            raise ValueError(
                f"held_out={share} leaves no training image of {row}: there are {count}, add some or hold out less"
            )
        held[of_group[:count]] = True
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def digits() -> DatasetDict:
    """scikit-learn's handwritten digits: 1,797 real gray images of 8x8 pixels; a fifth of each class is the test set."""
    from sklearn.datasets import load_digits  # only this data set needs it

    bunch = load_digits()
    images = [PILImage.fromarray((image * (255 / 16)).astype(np.uint8)) for image in bunch.images]
    features = Features({"image": Image(), "label": ClassLabel(names=[str(n) for n in range(10)])})
    rows = Dataset.from_dict({"image": images, "label": bunch.target.tolist()}, features=features)
    train, test = split_by_class(rows, "label", 0.2, seed=0)
    return DatasetDict(train=train, test=test)


EMBEDDED: dict[str, Callable[[], DatasetDict]] = {"numbers": lambda: numbers(digits()), "digits": digits}
