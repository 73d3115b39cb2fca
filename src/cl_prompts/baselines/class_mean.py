"""Nearest class mean."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.base import Baseline, Images
from cl_prompts.learner.features import record


class NearestClassMean(Baseline):
    """The class whose mean training feature has the largest cosine; nothing is trained.

    On pre-trained transformers after Janson, Zhang, Aljundi & Elhoseiny, "A Simple Baseline that Questions the Use of
    Pretrained-Models in Continual Learning", 2022 (arXiv:2210.04428).

    Args:
        backbone: see `Baseline`.
        freeze_backbone: must be True.
        options: see `Baseline`.
    """

    name = "ncm"
    needs_consolidation = True
    learns_without_tasks = True

    def __init__(self, backbone: nn.Module, *, freeze_backbone: bool = True, **options: Any) -> None:
        if not freeze_backbone:
            raise ValueError(f"freeze_backbone={freeze_backbone!r}: nearest class mean trains nothing, leave it out")
        super().__init__(backbone, freeze_backbone=True, **options)
        self.head.requires_grad_(False)
        self.sums = torch.zeros(0, self.features.width, dtype=torch.float64)
        self.counts = torch.zeros(0, dtype=torch.float64)

    def trains_task(self, number: int) -> bool:
        """No task is."""
        return False

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Add the images to the means of their classes."""
        sums, counts = class_sums(self, images)
        known = len(self.sums)
        sums[:known] += self.sums.to(sums.device)
        counts[:known] += self.counts.to(sums.device)
        self.sums, self.counts = sums, counts

    def answer(self, features: Tensor, logits: Tensor) -> Tensor:
        """Cosines to the means [B, C], -inf for classes without an image so far."""
        means = torch.zeros(logits.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
        means[: len(self.sums)] = self.sums / self.counts.clamp_min(1)[:, None]
        seen = torch.zeros(len(means), dtype=torch.bool, device=features.device)
        seen[: len(self.counts)] = self.counts > 0
        return cosines(features, means).masked_fill(~seen, -math.inf)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Sum and number of each class's features."""
        return {"sums": self.sums, "counts": self.counts}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take them back."""
        self.sums, self.counts = tensors["sums"], tensors["counts"]


def class_sums(learner: Baseline, images: Images, *, normalized: bool = False) -> tuple[Tensor, Tensor]:
    """Sums of the features of each known class over all processes [C, D], and their numbers [C]; float64.

    Args:
        learner: in eval mode.
        images: this process's share.
        normalized: bring each feature to length 1 first.
    """
    seen = record(learner.features_of, images)
    columns, _ = learner.head.to_targets(seen.labels)
    features = seen.features.double()
    sums = features.new_zeros(len(learner.classes), features.shape[1])
    sums.index_add_(0, columns, F.normalize(features, dim=1) if normalized else features)
    return sums, torch.bincount(columns, minlength=len(sums)).double()


def cosines(features: Tensor, means: Tensor) -> Tensor:
    """Cosine of every feature [B, D] with every mean [C, D]: [B, C] float32."""
    return F.linear(F.normalize(features.float(), dim=1), F.normalize(means, dim=1).float())
