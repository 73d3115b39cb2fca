"""Small data sets of real images, for the tests of streams."""

import io
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import Tensor


CLASSES = ["owl", "jay", "wren", "crow"]
DOMAINS = ["photo", "sketch", "cartoon"]


def pictures(count: int, seed: int = 0, *, size: tuple[int, int] = (6, 9)) -> list[PILImage.Image]:
    """RGB images of noise, [height, width] pixels, no two alike."""
    random = np.random.default_rng(seed)
    return [PILImage.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def encoded(image: PILImage.Image) -> dict[str, Any]:
    """An image as a PNG file's content."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def broken(image: PILImage.Image) -> dict[str, Any]:
    """The same file, cut short."""
    cell = encoded(image)
    return {"bytes": cell["bytes"][: len(cell["bytes"]) // 2], "path": "cut.png"}


def birds(
    labels: list[int], seed: int = 0, *, domains: list[int] | None = None, bad: tuple[int, ...] = (), names: Any = CLASSES
) -> Dataset:
    """Images with labels and, if asked for, domains; the rows `bad` hold files that are cut short."""
    images = pictures(len(labels), seed)
    cells = [broken(image) if row in bad else encoded(image) for row, image in enumerate(images)]
    columns: dict[str, Any] = {"image": cells, "label": labels}
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    if domains is not None:
        columns["domain"] = domains
        features["domain"] = ClassLabel(names=DOMAINS)
    return Dataset.from_dict(columns, features=features)


def to_tensor(image: Any) -> Tensor:
    """[3, 8, 8]; a function of its own, so that loader processes can be handed it."""
    return torch.from_numpy(np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)


def row_values(labels: list[int]) -> Dataset:
    """Rows without images: the image column holds the row's number."""
    features = Features({"image": Value("int64"), "label": Value("int64")})
    return Dataset.from_dict({"image": list(range(len(labels))), "label": labels}, features=features)


def number_to_tensor(number: int) -> Tensor:
    """[3, 1, 1] filled with the number."""
    return torch.full((3, 1, 1), float(number))
