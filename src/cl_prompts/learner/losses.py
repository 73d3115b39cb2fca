"""Summing the parts of a loss over a batch, over processes and over accumulated micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_prompts.interfaces import LossPart
from cl_prompts.runtime.distributed import sum_over_processes, world_size


def add_up(
    parts: Mapping[str, LossPart], valid: Tensor, num_items: Tensor | int | None, *, over_processes: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Reduce the parts of a loss over the batch and add them.

    If processes average their gradients, as DDP does, the result is the gradient over the global batch: "mean" parts are
    summed over this process's images, divided by the global number of images and multiplied by the number of processes.

    Args:
        parts: the loss parts by name.
        valid: True for real images, False for padding [B].
        num_items: number of images of the global batch over all accumulated micro-batches, as `transformers.Trainer` passes
            it; the caller then sums over micro-batches and processes. None: the batch is not accumulated.
        over_processes: whether the processes train together on one global batch.

    Returns:
        the total, a scalar, and its terms by name, also scalars.
    """
    own = valid.sum()
    scale = 1
    if num_items is not None:
        images = torch.as_tensor(num_items, device=own.device)
    elif over_processes:
        images, scale = sum_over_processes(own), world_size()
    else:
        images = own
    images = images.clamp_min(1)
    losses = {}
    for name, part in parts.items():
        if part.reduction == "batch":
            losses[name] = part.value if num_items is None else part.value * own / images
        else:
            # where() instead of a product: values of padding may be infinite, and 0 * inf is NaN
            total = torch.where(valid, part.value, 0.0).sum() * scale
            losses[name] = total / images if part.reduction == "mean" else total
    return torch.stack(list(losses.values())).sum(), losses
