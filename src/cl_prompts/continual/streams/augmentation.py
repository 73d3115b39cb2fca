"""Random crops and flips that follow from (seed, epoch, image number) alone.

Drawn with numpy and cut out with Pillow. kornia's crops draw from torch's global generator, so that an image's crop would
depend on what was drawn before, and take 7 ms an image on a CPU core.
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


_PURPOSE = 1  # keeps these draws apart from others that begin with the same numbers


@dataclass(frozen=True)
class CropAndFlip:
    """A random part of an image, mirrored or not; the model's processor resizes it afterwards (Inception's training crop).

    The defaults are those of the published L2P, DualPrompt and HiDe code; CODA-Prompt uses scale (0.08, 1).

    Args:
        scale: smallest and largest area of the part, as a share of the image's.
        ratio: smallest and largest width / height of the part.
        flip: probability of mirroring left and right.
        views: how many parts an image has: epoch e shows part e % views, so that what is computed of a part is computed
            once. None: a new part in every epoch.
        on_device: cut whole batches on the model's device, out of the images as the model's processor has resized them,
            and stretch the parts to that size (bilinear). Faster, and not the same pixels as a part that is resized once.

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
            raise ValueError(f"scale={self.scale} must be two shares of the image, the smaller first: 0 < low <= high <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio={self.ratio} must be two positive numbers, the smaller first")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} must be a probability")
        if self.views is not None and self.views < 1:
            raise ValueError(f"views={self.views} must be at least 1, or None for new ones in every epoch")

    def view(self, epoch: int) -> int:
        """Number of the part that `epoch` shows."""
        return epoch if self.views is None else epoch % self.views

    def apply(self, image: Any, seed: int, epoch: int, number: int) -> Any:
        """The part of an `image` that belongs to (`seed`, `epoch`, `number`): a PIL image, or a tensor [..., H, W]."""
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        (left, top, right, bottom), flipped = self._drawn(width, height, seed, epoch, number)
        if isinstance(image, Tensor):
            part = image[..., top:bottom, left:right]
            return part.flip(-1) if flipped else part
        from PIL import ImageOps  # a stream of tensors needs no Pillow

        part = image.crop((left, top, right, bottom))
        return ImageOps.mirror(part) if flipped else part

    def apply_batch(self, images: Tensor, seed: int, epoch: int, numbers: Sequence[int]) -> Tensor:
        """The parts of `images` [B, C, H, W] for (`seed`, `epoch`, each of `numbers`), stretched to [B, C, H, W]."""
        height, width = images.shape[-2:]
        maps = []
        for number in numbers:
            (left, top, right, bottom), flipped = self._drawn(width, height, seed, epoch, max(number, 0))
            wide, high = (right - left) / width, (bottom - top) / height
            middle = (left + right) / width - 1, (top + bottom) / height - 1
            maps.append([[-wide if flipped else wide, 0, middle[0]], [0, high, middle[1]]])
        with torch.autocast(images.device.type, enabled=False):  # half precision would move the parts
            grid = F.affine_grid(torch.tensor(maps, device=images.device), list(images.shape), align_corners=False)
            return F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False).to(images.dtype)

    def _drawn(self, width: int, height: int, seed: int, epoch: int, number: int) -> tuple[tuple[int, int, int, int], bool]:
        """The box of an image's part, and whether it is mirrored."""
        random = np.random.default_rng([seed, self.view(epoch), number, _PURPOSE])
        return self.box(width, height, random), bool(random.random() < self.flip)

    def box(self, width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a part in an image of `width` x `height` pixels, drawn from `random`.

        Area and logarithm of the ratio are uniform; of ten draws the first that fits is taken, else the largest part in
        the middle whose ratio is allowed.
        """
        areas = random.uniform(*self.scale, size=10) * width * height
        ratios = np.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), size=10))
        widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
        fitting = np.flatnonzero((widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height))
        if len(fitting):
            wide, high = int(widths[fitting[0]]), int(heights[fitting[0]])
            left, top = int(random.integers(width - wide + 1)), int(random.integers(height - high + 1))
        else:
            ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
            wide = max(1, min(width, round(height * ratio)))
            high = max(1, min(height, round(width / ratio)))
            left, top = (width - wide) // 2, (height - high) // 2
        return left, top, left + wide, top + high
