"""Batches that a caller passes to an evaluation or a consolidation, as dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def as_batch(batch: Any) -> Mapping[str, Any]:
    """A batch as a mapping with `pixel_values` and `labels`.

    Args:
        batch: such a mapping, or a pair (images, labels) of tensors, as a data loader over a data set of torch gives them.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(batch, Mapping) and {"pixel_values", "labels"} <= batch.keys():
        return batch
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return {"pixel_values": batch[0], "labels": batch[1]}
    what = f"a dict with {sorted(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
    raise TypeError(
        f"a batch is {what}: give batches with pixel_values and labels, as stream.images() does, or pairs (images, labels)"
    )
