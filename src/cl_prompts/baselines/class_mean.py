"""Nearest class mean."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.base import Baseline
from cl_prompts.heads.class_means import ClassMeans
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images


class NearestClassMean(Baseline):
    """The class whose mean training feature has the largest cosine; nothing is trained.

    On pre-trained transformers after Janson, Zhang, Aljundi & Elhoseiny, "A Simple Baseline that Questions the Use of
    Pretrained-Models in Continual Learning", 2022 (arXiv:2210.04428).

    Args:
        backbone: see `Baseline`.
        freeze_backbone: must be True.
        options: see `Baseline`.

    Attributes:
        means: of the classes seen so far.
    """

    name = "ncm"
    needs_consolidation = True
    learns_without_tasks = True

    def __init__(self, backbone: nn.Module, *, freeze_backbone: bool = True, **options: Any) -> None:
        if not freeze_backbone:
            raise ValueError(f"freeze_backbone={freeze_backbone!r}: nearest class mean trains nothing, leave it out")
        super().__init__(backbone, freeze_backbone=True, **options)
        self.head.requires_grad_(False)
        self.means = ClassMeans(self.features.width)

    def check_one_class(self) -> None:
        """Does nothing: a class is learned from its mean alone."""

    def trains_task(self, number: int) -> bool:
        """Whether task `number` is trained by gradient: no task is."""
        return False

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Add the task's `images` to the means of their classes; `memory` is not used."""
        seen = record(self.features_of, images)
        self.means.add(seen.features, self.head.to_targets(seen.labels)[0], len(self.classes))

    def predict(self, features: Tensor, logits: Tensor) -> Tensor:
        """Cosines to the means [B, C]; -inf for classes without an image so far."""
        cosines = self.means.cosines(features)
        return F.pad(cosines, (0, logits.shape[1] - cosines.shape[1]), value=-math.inf)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Sum and number of each class's features."""
        return self.means.state_dict()

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        self.means.load_state_dict(tensors)
