"""One optimizer step, and throughput in images per second."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cl_prompts.continual.batches import micro_batches
from cl_prompts.continual.progress import Progress
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.distributed import sum_over_processes, world_size


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Any],
    accelerator: Accelerator,
    *,
    gradient_accumulation_steps: int,
    max_grad_norm: float,
) -> dict[str, Tensor]:
    """Forward and backward of a batch, split into micro-batches, and one optimizer step.

    Args:
        model: the model, prepared by the accelerator.
        optimizer: the optimizer, prepared by the accelerator.
        batch: this process's share of the batch, on the model's device.
        accelerator: the run's accelerator.
        gradient_accumulation_steps: number of micro-batches.
        max_grad_norm: largest gradient norm; 0: no clipping.

    Returns:
        The loss as "loss" and its parts by name: detached scalars, whose mean over processes is the loss of the batch.
    """
    losses: dict[str, Tensor] = {}
    parts = micro_batches(batch, gradient_accumulation_steps)
    # Gradients are summed over micro-batches and averaged over processes, so each loss is divided by the number of images
    # of the global batch and multiplied by the number of processes.
    num_items: dict[str, Any] = {}
    if len(parts) > 1:
        num_items["num_items_in_batch"] = sum_over_processes((batch["labels"] != IGNORE_INDEX).sum())
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**part, **num_items)
            accelerator.backward(output.loss * world_size() if num_items else output.loss)
        for name, value in {"loss": output.loss, **(output.losses or {})}.items():
            losses[name] = losses.get(name, 0) + value.detach() * (world_size() if num_items else 1)
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return losses


class Throughput:
    """Counts this process's images and measures the time between two calls of `read`."""

    def __init__(self) -> None:
        self._images, self._since = 0, time.perf_counter()

    def add(self, labels: Tensor) -> None:
        """Add the images of a batch, given by its `labels` on the CPU; padding is not counted."""
        self._images += int((labels != IGNORE_INDEX).sum())

    def read(self) -> tuple[int, float]:
        """Images and seconds since the last call of `read` or since construction."""
        now = time.perf_counter()
        images, seconds = self._images, now - self._since
        self._images, self._since = 0, now
        return images, seconds


def global_logs(losses: dict[str, Tensor], throughput: Throughput, progress: Progress) -> dict[str, float]:
    """Losses of the last step and "images_per_second" over all processes, with one collective operation.

    All processes must call it; all get the same values.

    Args:
        losses: from `training_step`.
        throughput: of this process.
        progress: position of the step, for the error.

    Raises:
        FloatingPointError: a loss is not finite. It is raised on every process.
    """
    own = torch.stack([*losses.values()]).float()
    own = torch.cat([own, torch.tensor(throughput.read(), device=own.device)])
    *means, images, seconds = (sum_over_processes(own) / world_size()).tolist()
    logs = dict(zip(losses, means, strict=True))
    if not all(math.isfinite(value) for value in means):
        raise FloatingPointError(
            f"the loss is {logs} in task {progress.task}, epoch {progress.epoch}, step {progress.step}: lower the learning "
            "rate, or clip the gradient"
        )
    return {**logs, "images_per_second": images * world_size() / max(seconds, 1e-9)}
