"""Features of a task's images, collected in one pass outside training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_prompts.learner.batches import as_batch
from cl_prompts.runtime.distributed import gather_over_processes, world_size


@dataclass
class Recorded:
    """Features of images, in ascending order of `ids`, the same on every process.

    Args:
        features: input of the classifier [n, D], float32.
        labels: class ids [n].
        ids: numbers of the images [n].
        untrained: True for the images that were left out of the task's training [n]; None: for none.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    untrained: Tensor | None = None

    def __post_init__(self) -> None:
        if self.untrained is None:
            self.untrained = torch.zeros_like(self.labels, dtype=torch.bool)

    def features_of(self, seen: Recorded) -> Tensor:
        """These features, on the device of `seen`, which must be of the same images.

        Raises:
            ValueError: `seen` is of other images.
        """
        known = self.ids.to(seen.ids), self.labels.to(seen.labels)
        if not (torch.equal(known[0], seen.ids) and torch.equal(known[1], seen.labels)):
            raise ValueError(
                f"drift compensation needs the same images before and after the task: {len(self.ids)} were recorded, "
                f"{len(seen.ids)} came after, with other sample_ids or labels"
            )
        return self.features.to(seen.features)


@torch.no_grad()
def record(read: Callable[[Mapping[str, Any]], Tensor], images: Iterable[Mapping[str, Any]]) -> Recorded:
    """Compute features of images and gather them over processes. Padding and repeated images are left out.

    Args:
        read: function batch -> features [B, D].
        images: batches of this process's share, with `pixel_values`, `labels`, `sample_ids` and, where images were left
            out of the training, `untrained`. `sample_ids` may be missing with one process.

    Raises:
        TypeError: a batch has no `pixel_values` or `labels`.
        ValueError: there are no images, or no `sample_ids` with several processes.
    """
    parts: list[tuple[Tensor, ...]] = []
    passed = 0
    for given in images:
        batch = as_batch(given)
        labels = batch["labels"]
        ids = batch.get("sample_ids")
        if ids is None and world_size() > 1:
            raise ValueError("several processes share the images: pass sample_ids, a number for each, as the streams do")
        numbers = torch.arange(passed, passed + len(labels)) if ids is None else torch.as_tensor(ids)
        passed += len(labels)
        valid = labels >= 0
        untrained = torch.as_tensor(batch.get("untrained", torch.zeros_like(labels, dtype=torch.bool)))
        others = (labels, numbers.to(labels.device), untrained.to(labels.device))
        parts.append((read(batch)[valid].float(), *(values[valid] for values in others)))
    if not parts:
        raise ValueError("there are no images to look at")
    features, labels, numbers, untrained = (
        torch.cat(gather_over_processes(torch.cat(values))) for values in zip(*parts, strict=True)
    )
    order = numbers.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = numbers[order][1:] != numbers[order][:-1]
    order = order[first]
    if not len(order):
        raise ValueError("there are no images to look at: all are padding")
    return Recorded(features[order], labels[order], numbers[order], untrained[order])
