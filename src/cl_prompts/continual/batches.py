"""Batches on their way from the stream to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch


class LookedAt:
    """Images to look at outside training, batch by batch on the device; can be gone through again and again.

    Args:
        batches: makes an iterable over this process's share.
        device: where the model is.
    """

    def __init__(self, batches: Callable[[], Iterable[dict[str, Any]]], device: torch.device) -> None:
        self._batches, self._device = batches, device

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self._batches():
            yield on_device(batch, self._device)


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on the device; `sample_ids` stay on the host, where they are looked at."""
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


def micro_batches(batch: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
    """A batch cut into (at most) so many pieces of nearly equal size, tensors and lists alike."""
    images = len(batch["labels"])
    size = -(-images // min(pieces, images))
    return [{k: v[start : start + size] for k, v in batch.items()} for start in range(0, images, size)]
