"""Moving batches to a device, and splitting them into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch


class DeviceBatches:
    """Batches moved to a device. Can be iterated over several times.

    Args:
        batches: function that returns an iterable over this process's share of the batches.
        device: the model's device.
    """

    def __init__(self, batches: Callable[[], Iterable[dict[str, Any]]], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield to_device(batch, self._device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch to a device. Other values (`sample_ids`, a list) are kept."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def micro_batches(batch: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """Split a batch of tensors and lists into at most `pieces` parts of nearly equal size."""
    images = len(batch["labels"])
    size = -(-images // min(pieces, images))
    return [{k: v[start : start + size] for k, v in batch.items()} for start in range(0, images, size)]
