"""How the parts of a loss add up over a batch, over processes and over accumulated micro-batches."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_prompts.interfaces import LossPart
from cl_prompts.runtime.distributed import sum_over_processes, world_size


def add_up(
    parts: Mapping[str, LossPart], valid: Tensor, num_items: Tensor | int | None, *, over_processes: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total loss and its parts, each as it enters the total.

    Several processes that average their gradients (as DDP does) get the gradient of the whole global batch: sums are
    divided by the global number of images and multiplied by the number of processes, whatever the share of each.

    Args:
        parts: the loss parts by name.
        valid: True for real images, False for padding [B].
        num_items: number of images of the whole accumulated global batch, as `transformers.Trainer` passes it; the caller
            then adds micro-batches and processes up itself. None: this batch is the whole one.
        over_processes: whether the processes train together on one global batch.

    Returns:
        the total, a scalar, and its terms by name, scalars too.
    """
    own = valid.sum()
    scale = 1
    if num_items is not None:
        whole = torch.as_tensor(num_items, device=own.device)
    elif over_processes:
        whole, scale = sum_over_processes(own), world_size()
    else:
        whole = own
    whole = whole.clamp_min(1)
    losses = {}
    for name, part in parts.items():
        if part.reduction == "batch":
            losses[name] = part.value if num_items is None else part.value * own / whole
        else:
            # where() instead of a product: padding may hold anything, and 0 * inf is NaN
            total = torch.where(valid, part.value, 0.0).sum() * scale
            losses[name] = total / whole if part.reduction == "mean" else total
    return torch.stack(list(losses.values())).sum(), losses
