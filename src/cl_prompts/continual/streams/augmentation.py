"""Random crops and flips as a function of (seed, epoch, image number).

numpy draws the crops and Pillow cuts them. kornia's crops use torch's global generator, so that the crop of an image would
depend on earlier draws, and take 7 ms per image on a CPU core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


_SEED_SUFFIX = 1  # makes these draws differ from others with the same seed, epoch and number


@dataclass(frozen=True)
class CropAndFlip:
    """Random resized crop with a random horizontal flip; the model's image processor resizes the crop.

    The defaults are those of the published L2P, DualPrompt and HiDe code; CODA-Prompt uses scale (0.08, 1).

    Args:
        scale: smallest and largest area of the crop, as a fraction of the image's area.
        ratio: smallest and largest width / height of the crop.
        flip: probability of a horizontal flip.
        views: number of different crops per image: epoch e shows crop e % views, so that results computed from a crop can
            be cached. None: a new crop in every epoch.
        on_device: crop whole batches on the model's device, after the image processor has resized the images, and resize
            the crops to the same size (bilinear). This is faster, and gives other pixels than cropping before resizing.

    Raises:
        ValueError: a range is empty or not positive, `flip` is no probability, or `views` is below 1.
    """

    scale: tuple[float, float] = (0.05, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    views: int | None = None
    on_device: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale} must be two fractions with 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio={self.ratio} must be two positive numbers, the smaller one first")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} must be a probability")
        if self.views is not None and self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1, or None for a new crop in every epoch")

    def view(self, epoch: int) -> int:
        """Number of the crop that `epoch` shows."""
        return epoch if self.views is None else epoch % self.views

    def apply(self, image: Any, seed: int, epoch: int, number: int) -> Any:
        """The crop of an image, flipped or not.

        Args:
            image: PIL image, or tensor [..., H, W].
            seed: seed of the run.
            epoch: epoch of the task.
            number: number of the image.
        """
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        (left, top, right, bottom), flipped = self._draw(width, height, seed, epoch, number)
        if isinstance(image, Tensor):
            crop = image[..., top:bottom, left:right]
            return crop.flip(-1) if flipped else crop
        from PIL import ImageOps  # not needed for streams of tensors

        crop = image.crop((left, top, right, bottom))
        return ImageOps.mirror(crop) if flipped else crop

    def apply_batch(self, images: Tensor, seed: int, epoch: int, numbers: Sequence[int]) -> Tensor:
        """The crops of a batch, resized to the size of the images [B, C, H, W].

        Args:
            images: images [B, C, H, W].
            seed: seed of the run.
            epoch: epoch of the task.
            numbers: number of each image; negative for padding.
        """
        height, width = images.shape[-2:]
        matrices = []
        for number in numbers:
            (left, top, right, bottom), flipped = self._draw(width, height, seed, epoch, max(number, 0))
            scale_x, scale_y = (right - left) / width, (bottom - top) / height
            center_x, center_y = (left + right) / width - 1, (top + bottom) / height - 1
            matrices.append([[-scale_x if flipped else scale_x, 0, center_x], [0, scale_y, center_y]])
        with torch.autocast(images.device.type, enabled=False):  # half precision would shift the crops
            grid = F.affine_grid(torch.tensor(matrices, device=images.device), list(images.shape), align_corners=False)
            return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)

    def _draw(self, width: int, height: int, seed: int, epoch: int, number: int) -> tuple[tuple[int, int, int, int], bool]:
        """The box of an image's crop, and whether it is flipped."""
        random = np.random.default_rng([seed, self.view(epoch), number, _SEED_SUFFIX])
        return self.box(width, height, random), bool(random.random() < self.flip)

    def box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop of an image of `width` x `height` pixels, drawn from `random`.

        The area and the logarithm of the ratio are uniform. Of ten draws the first that fits into the image is used; if
        none fits, the largest centered crop with an allowed ratio.
        """
        areas = random.uniform(*self.scale, size=10) * width * height
        ratios = np.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), size=10))
        widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
        fitting = np.flatnonzero((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height))
        if len(fitting):
            crop_width, crop_height = int(widths[fitting[0]]), int(heights[fitting[0]])
            left, top = int(random.integers(width - crop_width + 1)), int(random.integers(height - crop_height + 1))
        else:
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            crop_width = max(1, min(width, round(height * ratio)))
            crop_height = max(1, min(height, round(width / ratio)))
            left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height
