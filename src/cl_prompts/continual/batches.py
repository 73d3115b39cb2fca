"""Batches on their way from the stream to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch


class DeviceBatches:
    """Batches on the model's device. It can be iterated over several times.

    Args:
        batches: returns an iterable over this process's share of the batches.
        device: where the model is.
    """

    def __init__(self, batches: Callable[[], Iterable[dict[str, Any]]], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield to_device(batch, self._device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device; `sample_ids`, a list, stays on the host."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def micro_batches(batch: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """A batch cut into at most `pieces` parts of nearly equal size, tensors and lists alike."""
    images = len(batch["labels"])
    size = -(-images // min(pieces, images))
    return [{k: v[start : start + size] for k, v in batch.items()} for start in range(0, images, size)]
