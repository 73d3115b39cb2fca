"""Digits with neighbours, as they stand in a written number: the embedded data of the main job."""

from __future__ import annotations

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image as PILImage


SIDE, HEIGHT, STEP = 32, 16, 13  # of the image, of a digit's box, and from a digit to the next, in pixels
DRAWS = 2  # images of each digit


def numbers(digits: DatasetDict) -> DatasetDict:
    """Images of 32x32 pixels with three digits in a row. The class is the digit in the middle.

    Each digit is in the middle of two images, between two others that are drawn from the same split, so that no test digit
    is seen in training. Each of the three is moved by up to a pixel in both directions. The draw is the same in every call.

    Args:
        digits: splits of gray images ("image") of single digits, with their classes ("label").
    """
    return DatasetDict({name: in_rows(rows, seed) for seed, (name, rows) in enumerate(digits.items())})


def in_rows(rows: Dataset, seed: int) -> Dataset:
    """The images of a split."""
    random = np.random.default_rng(seed)
    single = [np.asarray(image.resize((HEIGHT, HEIGHT), PILImage.Resampling.BILINEAR)) for image in rows["image"]]
    middle = np.tile(np.arange(len(single)), DRAWS)
    left, right = random.integers(len(single), size=(2, len(middle)))
    moves = random.integers(-1, 2, size=(len(middle), 3, 2))
    images = [
        PILImage.fromarray(in_a_row([single[n] for n in three], shift))
        for three, shift in zip(zip(left, middle, right, strict=True), moves, strict=True)
    ]
    return Dataset.from_dict({"image": images, "label": np.tile(rows["label"], DRAWS)}, features=rows.features)


def in_a_row(three: list[np.ndarray], moves: np.ndarray) -> np.ndarray:
    """One image [SIDE, SIDE] of three digits, moved by (down, right) pixels each; their ends may lie outside."""
    canvas = np.zeros((SIDE, SIDE + 2 * STEP), np.uint8)
    for place, (digit, (down, right)) in enumerate(zip(three, moves, strict=True)):
        top, first = (SIDE - HEIGHT) // 2 + down, (SIDE - HEIGHT) // 2 + place * STEP + right
        part = canvas[top : top + HEIGHT, first : first + HEIGHT]
        np.maximum(part, digit, out=part)
    return canvas[:, STEP : STEP + SIDE]
