"""Replay of stored images: experience replay, and dark experience replay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.batch import Batch
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images


class ER(Baseline):
    """Stored images join each batch; the loss is the cross entropy of both over all known classes.

    Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019 (arXiv:1902.10486): the mean over new and
    remembered images together. The memory is the trainer's (`RehearsalMemory`).
    """

    name = "er"
    replay = "mixed"
    needs_memory = True
    learns_without_tasks = True


class DERPlusPlus(Baseline):
    """Stored images join each batch with their labels and with the logits that they once got.

    Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020: for
    remembered images alpha * squared distance of the logits + beta * cross entropy. As in the published code the distance
    is the mean over classes. What differs: logits are taken at the end of the image's task, when it enters the memory, not
    along the way, and bind the classes known by then; both terms use the same remembered images; the mean is over new and
    remembered images together (half the published loss where there are as many of both).

    Args:
        backbone: see `Baseline`.
        alpha: weight of the distance; 0.1 as in the published code for split CIFAR-10 and a memory of 500 images.
        beta: weight of the cross entropy of remembered images; 0.5, likewise.
        options: see `Baseline`.

    Attributes:
        stored_numbers: `sample_ids` of the remembered images, ascending [n].
        stored_logits: their logits [n, C], zeros beyond the classes known then.
        stored_classes: how many classes were known then [n].
    """

    name = "der++"
    replay = "mixed"
    needs_memory = True
    needs_consolidation = True

    def __init__(self, backbone: nn.Module, *, alpha: float = 0.1, beta: float = 0.5, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.alpha, self.beta = self.number("alpha", alpha), self.number("beta", beta)
        self.stored_numbers = torch.zeros(0, dtype=torch.int64)
        self.stored_logits = torch.zeros(0, 0)
        self.stored_classes = torch.zeros(0, dtype=torch.int64)

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy, of remembered images times beta, and the distance to their stored logits times alpha."""
        each = self.cross_entropy(batch).value
        if not len(self.stored_numbers):
            return {"cross_entropy": LossPart(each, "mean")}
        rows, remembered = self._look_up(batch.numbers)
        stored, known = self.stored_logits[rows], self.stored_classes[rows]
        num_classes = stored.shape[1]
        bound = torch.arange(num_classes, device=known.device) < known[:, None]
        distance = self.distance(batch.logits[:, :num_classes], stored, bound)
        return {
            "cross_entropy": LossPart(torch.where(remembered, self.beta * each, each), "mean"),
            "logits": LossPart(torch.where(remembered, self.alpha * distance, 0.0), "mean"),
        }

    def distance(self, logits: Tensor, stored: Tensor, bound: Tensor) -> Tensor:
        """Mean squared distance [B] of `logits` and `stored` ones [B, C] over the classes that are `bound` [B, C]."""
        return ((logits - stored).square() * bound).sum(1) / bound.sum(1)

    def _look_up(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of images in the store [B], and which are there [B]."""
        rows = torch.searchsorted(self.stored_numbers, numbers).clamp_max(len(self.stored_numbers) - 1)
        return rows, self.stored_numbers[rows] == numbers

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Store the logits of images that are new in `memory`, and drop those that are no longer in it.

        The task's `images` are not used.

        Raises:
            ValueError: no images are stored.
        """
        if memory is None:
            raise ValueError(f'"{self.name}" needs remembered images: set memory_size or memory_per_class')
        seen = record(lambda batch: self.logits_of(self.features_of(batch)), memory)
        logits, new = seen.features, seen.ids
        num_classes = torch.full_like(new, logits.shape[1])
        if len(self.stored_numbers):
            rows, known = self._look_up(new)
            logits[known] = 0
            logits[known, : self.stored_logits.shape[1]] = self.stored_logits[rows[known]]
            num_classes[known] = self.stored_classes[rows[known]]
        self.stored_numbers, self.stored_logits, self.stored_classes = new, logits, num_classes

    def extra_tensors(self) -> dict[str, Tensor]:
        """The stored logits."""
        return {"numbers": self.stored_numbers, "logits": self.stored_logits, "columns": self.stored_classes}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        self.stored_numbers, self.stored_logits = tensors["numbers"], tensors["logits"]
        self.stored_classes = tensors["columns"]
