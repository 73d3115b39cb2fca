"""Folders of labeled images for the commands, and the accuracy on them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from cl_prompts.pipeline import PromptPoolPipeline


def list_images(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """The images of a folder by class, sorted by name. Hidden files are left out.

    Args:
        folder: has one folder of images per class, or the images of one class, which is named like the folder.

    Raises:
        ValueError: there is no such folder, an entry is neither a folder nor an image, or a class has no images.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"there is no folder {folder}: give one with a folder of images per class")
    entries = _visible(root)
    folders = [entry for entry in entries if entry.is_dir()]
    if not folders:
        classes = {root.resolve().name: entries}
    else:
        beside = [str(entry) for entry in entries if not entry.is_dir()]
        if beside:
            raise ValueError(f"{beside[0]} stands beside folders of classes: move it into one of them, or away")
        classes = {entry.name: _visible(entry) for entry in folders}
    known = Image.registered_extensions()
    for name, images in classes.items():
        if not images:
            raise ValueError(f"the folder of class {name!r} is empty: add images, or remove it")
        for image in images:
            if image.is_dir() or image.suffix.lower() not in known:
                raise ValueError(f"{image} is no image: move it away; images stand in FOLDER/CLASS/IMAGE")
    return classes


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def count_correct(pipe: PromptPoolPipeline, images: Mapping[str, Sequence[Path]]) -> Counter[str]:
    """Number of images that the pipeline gives their class, by class.

    Args:
        pipe: the pipeline.
        images: files by class name.

    Raises:
        ValueError: an image cannot be read.
    """
    correct: Counter[str] = Counter()
    files = [(name, file) for name, of_class in images.items() for file in of_class]
    for start in range(0, len(files), pipe.batch_size):
        batch = files[start : start + pipe.batch_size]
        answers = pipe.classify([pipe.preprocess(file) for _, file in batch], top_k=1)
        correct.update(name for (name, _), answer in zip(batch, answers, strict=True) if answer[0]["label"] == name)
    return correct


def percent(correct: Mapping[str, int], images: Mapping[str, Sequence[Path]], names: Sequence[str]) -> float:
    """Accuracy over the images of the classes `names`, in percent; 0 without images."""
    total = sum(len(images[name]) for name in names)
    return 100 * sum(correct.get(name, 0) for name in names) / total if total else 0.0
