"""Small data sets of real images, and batches of streams over them."""

import io
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from torch import Tensor

from cl_prompts.continual import Stream


CLASSES = ["owl", "jay", "wren", "crow"]
DOMAINS = ["photo", "sketch", "cartoon"]


def pictures(count: int, seed: int = 0, *, size: tuple[int, int] = (6, 9)) -> list[PILImage.Image]:
    """Different RGB images of noise, [height, width] pixels."""
    random = np.random.default_rng(seed)
    return [PILImage.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def encoded(image: PILImage.Image) -> dict[str, Any]:
    """A cell of an image column: the content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def broken(image: PILImage.Image) -> dict[str, Any]:
    """The same, with the file truncated."""
    cell = encoded(image)
    return {"bytes": cell["bytes"][: len(cell["bytes"]) // 2], "path": "cut.png"}


def birds(
    labels: list[int], seed: int = 0, *, domains: list[int] | None = None, bad: tuple[int, ...] = (), names: Any = CLASSES
) -> Dataset:
    """Images with labels and, if given, domains; the files of the rows `bad` are truncated."""
    images = pictures(len(labels), seed)
    cells = [broken(image) if row in bad else encoded(image) for row, image in enumerate(images)]
    columns: dict[str, Any] = {"image": cells, "label": labels}
    features = Features({"image": Image(), "label": ClassLabel(names=list(names))})
    if domains is not None:
        columns["domain"] = domains
        features["domain"] = ClassLabel(names=DOMAINS)
    return Dataset.from_dict(columns, features=features)


def to_tensor(image: Any) -> Tensor:
    """An image as [3, 8, 8]; can be pickled for loader processes."""
    return torch.from_numpy(np.asarray(image.convert("RGB").resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)


def row_values(labels: list[int]) -> Dataset:
    """Rows without images: the image column holds the number of the row."""
    features = Features({"image": Value("int64"), "label": Value("int64")})
    return Dataset.from_dict({"image": list(range(len(labels))), "label": labels}, features=features)


def number_to_tensor(number: int) -> Tensor:
    """[3, 1, 1] filled with the number."""
    return torch.full((3, 1, 1), float(number))


def train_batches(stream: Stream, task: int = 0, batch_size: int = 4, *, seed: int = 0, epoch: int = 0, **more: Any) -> Any:
    """Training batches of a task, by its number."""
    return stream.train_batches(stream.tasks[task], batch_size, seed=seed, epoch=epoch, **more)


def sample_ids(batches: Any) -> list[list[int]]:
    """`sample_ids` of each batch."""
    return [batch["sample_ids"] for batch in batches]


def images_by_id(batches: Any) -> dict[int, Tensor]:
    """`pixel_values` of each image by its id; padding included under its own id."""
    return {i: x for batch in batches for i, x in zip(batch["sample_ids"], batch["pixel_values"], strict=True)}
