"""A second view of training images, for losses that compare two views."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.runtime.precision import device_of_float64


LEAST_AREA = 0.3  # of a crop, as a share of the image


def second_view(images: Tensor, numbers: Tensor, step: int) -> Tensor:
    """Random square crops of images [B, 3, H, W], resized to H x W.

    The crop follows from the image's number and the step alone, so that it is the same on any number of processes, in
    accumulated parts of a batch and in a resumed run.

    Args:
        images: [B, 3, H, W].
        numbers: `sample_ids` of the images [B].
        step: number of the optimizer step.

    Raises:
        ValueError: the images are of another form, like patches.
    """
    if images.dim() != 4:
        raise ValueError(f"a second view is a crop of images [B, 3, H, W], and these have shape {list(images.shape)}")
    side = (LEAST_AREA + (1 - LEAST_AREA) * uniform(numbers, step, 0)).sqrt()
    corners = [(2 * uniform(numbers, step, draw) - 1) * (1 - side) for draw in (1, 2)]
    zero = torch.zeros_like(side)
    maps = torch.stack([side, zero, corners[0], zero, side, corners[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def uniform(numbers: Tensor, step: int, draw: int) -> Tensor:
    """Numbers in [0, 1) that look random, float64 [B], from integers [B] (the last steps of MurmurHash3)."""
    numbers = numbers.to(device_of_float64(numbers.device)).long()
    x = numbers * 6364136223846793005 + torch.tensor(3 * step + draw, device=numbers.device) * 1442695040888963407
    for factor in (-49064778989728563, -4265267296055464877):
        x = (x ^ (x >> 33)) * factor
    return ((x ^ (x >> 33)) & (2**52 - 1)).double() / 2**52
