"""One optimizer step, and the images per second of several."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cl_prompts.continual.batches import micro_batches
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
    """Forward and backward of a batch, piece by piece, and one step of the optimizer.

    Args:
        model: prepared by the accelerator.
        optimizer: likewise.
        batch: this process's share, on the model's device.
        accelerator: the run's.
        gradient_accumulation_steps: micro batches that the batch is cut into.
        max_grad_norm: largest gradient norm; 0: no clipping.

    Returns:
        The loss ("loss") and its parts by name, detached.
    """
    losses: dict[str, Tensor] = {}
    parts = micro_batches(batch, gradient_accumulation_steps)
    # Gradients of pieces are summed and those of processes averaged, so each piece is scaled by the images of all.
    whole: dict[str, Any] = {}
    if len(parts) > 1:
        whole["num_items_in_batch"] = sum_over_processes((batch["labels"] != IGNORE_INDEX).sum())
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            output = model(**part, **whole)
            accelerator.backward(output.loss * world_size() if whole else output.loss)
        for name, value in {"loss": output.loss, **(output.losses or {})}.items():
            losses[name] = losses.get(name, 0) + value.detach()
    if max_grad_norm:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return losses


class Throughput:
    """Images per second since it was last read."""

    def __init__(self) -> None:
        self._images, self._since = 0, time.perf_counter()

    def add(self, images: int) -> None:
        """Count images."""
        self._images += images

    def read(self) -> float:
        """Images per second since the last call, or since it was made."""
        now = time.perf_counter()
        rate = self._images / max(now - self._since, 1e-9)
        self._images, self._since = 0, now
        return rate
