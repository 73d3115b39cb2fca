"""What a transform may be and return, and errors of the user's own code."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from support.data_sets import (
    IMAGES,
    LABELS,
    LikeTorchvision,
    class_stream,
    forms_of_images,
)
from support.stream_data import birds, to_tensor, train_batches
from transformers import ViTImageProcessor

from cl_prompts.continual import (
    ClassIncrementalStream,
)
from cl_prompts.continual.streams.transforms import as_transform
from cl_prompts.interfaces import IGNORE_INDEX


# ---- transforms ------------------------------------------------------------------------------------------------------


PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})


class WithImageProcessor:
    """As the processors of models for images and text are."""

    image_processor = PROCESSOR


@pytest.mark.parametrize(
    "transform",
    [
        PROCESSOR,
        WithImageProcessor(),
        lambda image: PROCESSOR(image),
        lambda image: PROCESSOR(image, return_tensors="pt"),
        lambda image: PROCESSOR(image, return_tensors="np")["pixel_values"],
        lambda image: PROCESSOR(image, return_tensors="np")["pixel_values"][0].astype(np.float64),
    ],
)
def test_an_image_processor_as_transform(transform: Any) -> None:
    stream = class_stream(birds(LABELS), transform=transform)
    pixels = stream.pixels(IMAGES[0])
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, PROCESSOR(IMAGES[0], return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (None, r"transform=None: pass a function image -> tensor \[3, H, W\], or the base's image processor"),
        ("google/vit", "transform='google/vit': pass a function"),
        (ViTImageProcessor, "transform=<class .*: pass a function"),
    ],
)
def test_what_is_no_transform(transform: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        class_stream(birds(LABELS), transform=transform)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, r"the transform returned a \w+: end it with ToTensor\(\)"),
        (lambda image: None, "the transform returned a NoneType"),
        (lambda image: {"image": image}, r"the transform returned a dict with \['image'\]"),
        (
            lambda image: np.asarray(image) / 255,
            r"returned shape \[6, 9, 3\], expected .*: permute\(2, 0, 1\) puts the chan",
        ),
        (
            lambda image: torch.zeros(2, 3, 8, 8),
            r"returned shape \[2, 3, 8, 8\], expected \[3, height, width\]: return one",
        ),
        (lambda image: torch.zeros(3, 8, 8, dtype=torch.uint8), r"returned torch\.uint8: convert to float and normalize"),
        (
            lambda image: torch.zeros(3, 8, 1 + np.asarray(image)[0, 0, 0] % 7),
            "images of sizes .*: let it resize all to one",
        ),
    ],
)
def test_what_is_no_image(transform: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        list(train_batches(class_stream(birds(LABELS), transform=transform)))


def test_an_image_processor_gets_16_bit_gray_by_the_rule_of_all_images() -> None:
    """`PIL.Image.convert` would make every pixel above 255 white."""
    gray = np.full((8, 8), 30_000, np.uint16)
    pixels = as_transform(PROCESSOR)(PILImage.fromarray(gray))
    expected = as_transform(PROCESSOR)(PILImage.new("RGB", (8, 8), (round(30_000 / 257),) * 3))
    assert torch.equal(pixels, expected)


def test_an_array_of_unknown_range_is_a_bad_image() -> None:
    images = [np.full((8, 8, 3), 2.0), *(np.asarray(image) for image in IMAGES[1:])]
    (batch,) = train_batches(class_stream((images, LABELS), on_bad_image="skip"))
    assert sorted(batch["labels"].tolist()) == [IGNORE_INDEX, 0, 1, 1]
    with pytest.raises(ValueError, match=r"train row 0 cannot be read \(values outside \[0, 1\]"):
        list(train_batches(class_stream((images, LABELS))))


# ---- errors of the user's own code -----------------------------------------------------------------------------------


def fails_for_jays(rows: Any) -> Any:
    """A transform of a data set with a bug that one class shows."""
    images = [undefined_name(i) if c == 1 else i for i, c in zip(rows["image"], rows["label"], strict=True)]  # type: ignore[name-defined]  # noqa: F821
    return {"image": images, "label": rows["label"]}


def fails_for_the_second(image: PILImage.Image) -> Any:
    return undefined_name(image) if image is IMAGES[1] else image  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("on_bad_image", ["skip", "stop"])
@pytest.mark.parametrize("kind", ["datasets", "torch", "stream"])
def test_a_bug_in_a_transform_is_no_bad_image(kind: str, on_bad_image: str) -> None:
    """Under "skip" it would drop a whole class without a word."""
    data: Any = birds(LABELS).with_transform(fails_for_jays) if kind == "datasets" else birds(LABELS)
    if kind == "torch":
        data = LikeTorchvision(transform=fails_for_the_second)
    transform: Any = (lambda image: undefined_name(image)) if kind == "stream" else to_tensor  # type: ignore[name-defined]  # noqa: F821
    # Labels are known without the transform, as in a data set that is opened by others.
    stream = class_stream(birds(LABELS), transform=transform, on_bad_image=on_bad_image)
    assert isinstance(stream, ClassIncrementalStream)
    stream.train = class_stream(data, on_bad_image=on_bad_image).train if kind == "torch" else data
    with pytest.raises(NameError, match="undefined_name"):
        list(train_batches(stream))


def test_a_bad_image_under_a_transform_of_the_data_set_is_still_skipped() -> None:
    def copied(rows: Any) -> Any:
        return {"image": [image.copy() for image in rows["image"]], "label": rows["label"]}

    stream = class_stream(birds(LABELS), on_bad_image="skip")
    assert isinstance(stream, ClassIncrementalStream)
    stream.train = birds(LABELS, bad=(1,)).with_transform(copied)
    (batch,) = train_batches(stream)
    assert sorted(batch["labels"].tolist()) == [IGNORE_INDEX, 0, 0, 1]
    assert stream.skipped["train"] == [1]


def test_a_file_that_is_not_there_is_a_bad_image(tmp_path: Path) -> None:
    paths = [tmp_path / "gone.png", *forms_of_images(tmp_path)["paths"][1:]]
    stream = class_stream((paths, LABELS), on_bad_image="skip")
    (batch,) = train_batches(stream)
    assert sorted(batch["labels"].tolist()) == [IGNORE_INDEX, 0, 1, 1]
    with pytest.raises(ValueError, match=r"train row 0 cannot be read \(there is no such file"):
        list(train_batches(class_stream((paths, LABELS))))
