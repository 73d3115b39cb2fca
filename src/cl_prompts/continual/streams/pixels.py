"""Resized images kept in 8 bits, so that an image is decoded and resized once in a run.

Image processors resize to 8 bits and then map each of the 256 values of a channel to one number. The numbers are taken from
what the transform itself returns, so that an image read here equals the transform's bit for bit. If a value has several
numbers, as in a transform that looks at the whole image, nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_prompts.continual.streams.kept_rows import KeptRows, PrivateFile, record_size


@runtime_checkable
class EightBitTransform(Protocol):
    """A transform whose last step maps the 8-bit values of resized images to numbers."""

    def __call__(self, image: Any) -> Tensor:
        """The tensor [3, H, W] of an image."""
        ...

    def resized(self, image: Any) -> Tensor:
        """The image before that step: [3, H, W], uint8."""
        ...


CHECKED = 32  # first images of a split whose numbers are compared with what the transform returns


class KeptPixels:
    """What a transform makes of the images of one split, by row number. Loader processes that are forked share it.

    Args:
        transform: the transform.
        rows: number of rows that will be read.
        max_bytes: limit on the size of the file; if the images of all rows are larger, none is kept.
        folder: folder on the disk to use; None: that of temporary files.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, transform: EightBitTransform, rows: int, max_bytes: int, folder: Path | None = None) -> None:
        self.transform, self.rows, self.max_bytes = transform, rows, max_bytes
        self.numbers: NDArray[np.float32] | None = None  # of each value of each channel [channels, 256]; NaN if unknown
        self.checked = 0  # images compared with the transform
        self._file: PrivateFile | None = PrivateFile(folder)
        self._kept: KeptRows | None = None  # made when the size of the images is known

    def __getstate__(self) -> dict[str, Any]:
        """For loader processes that are not forked, which cannot share the file: they keep nothing."""
        return vars(self) | {"_file": None, "_kept": None}

    def read(self, row: int) -> Tensor | None:
        """The tensor [3, H, W] of a row; None if it is not kept."""
        codes = None if self._kept is None else self._kept.read(row)
        return None if codes is None else self._finished(codes)

    def keep(self, row: int, image: Any, transform: Callable[[Any], Tensor]) -> Tensor | None:
        """Keep an image.

        Args:
            row: its row number.
            image: the image as the transform gets it.
            transform: the transform, with checks of what it returns.

        Returns:
            The tensor [3, H, W] of the image; None if images cannot be kept.
        """
        if self._file is None:
            return None
        try:
            resized = self.transform.resized(image)
        except Exception:  # whatever is wrong with the image, the transform itself tells it
            self._give_up()
            return None
        if resized.dtype != torch.uint8 or resized.dim() != 3:
            self._give_up()
            return None
        codes = resized.numpy()
        if self._kept is None and self.rows * record_size(codes.shape, np.uint8) <= self.max_bytes:
            self._kept = KeptRows(self._file, codes.shape, np.uint8)
        if self._kept is None or self._kept.shape != codes.shape:
            self._give_up()
            return None
        pixels = self._finished(codes) if self.checked >= CHECKED else None
        if pixels is None:
            pixels = transform(image)
            self.checked += 1
            if not self._learn(codes, pixels):
                self._give_up()
                return None
        try:
            self._kept.write(row, codes)
        except OSError:  # the disk is full: images are read again
            self._give_up()
        return pixels

    def _finished(self, codes: NDArray[np.uint8]) -> Tensor | None:
        """The tensor of a resized image; None if the number of one of its values is not known yet."""
        if self.numbers is None:
            return None
        pixels = np.empty(codes.shape, np.float32)
        for channel, numbers in enumerate(self.numbers):
            np.take(numbers, codes[channel], out=pixels[channel], mode="clip")  # without "clip" numpy makes a copy
        return None if np.isnan(pixels.max()) else torch.from_numpy(pixels)

    def _learn(self, codes: NDArray[np.uint8], pixels: Tensor) -> bool:
        """Take the numbers of the values of an image from it; False if a value has several, or the shapes differ."""
        if pixels.dtype != torch.float32 or pixels.shape != codes.shape:
            return False
        numbers = np.full((len(codes), 256), np.nan, np.float32) if self.numbers is None else self.numbers.copy()
        before = numbers.copy()
        for channel in range(len(codes)):
            numbers[channel][codes[channel]] = pixels[channel].numpy()
        if not np.array_equal(numbers[~np.isnan(before)], before[~np.isnan(before)]):
            return False
        self.numbers = numbers
        again = self._finished(codes)
        return again is not None and torch.equal(again, pixels)

    def _give_up(self) -> None:
        """Keep nothing from now on."""
        self._file = self._kept = None
