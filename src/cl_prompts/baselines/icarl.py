"""iCaRL: incremental classifier and representation learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.teacher import DistillingBaseline
from cl_prompts.heads.class_means import ClassMeans, cosines
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.precision import device_of_float64


class ICaRL(DistillingBaseline):
    """Replay with sigmoid outputs and distillation; exemplars are chosen by herding, and the nearest exemplar mean answers.

    Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017: algorithms 1 (answer), 3 (loss:
    binary cross entropy, summed over classes, towards the label for the task's classes and towards the earlier model's
    sigmoid for all others), 4 (herding) and 5 (the memory keeps the first of each class). Features are brought to length 1.
    Stored images join each batch instead of being mixed into the task's.

    Args:
        backbone: see `Baseline`.
        options: see `Baseline`.

    Attributes:
        means: mean feature of each class's exemplars, of length 1 [C, D]; empty before the first task has ended, when the
            head answers.
    """

    name = "icarl"
    replay = "mixed"
    needs_memory = True
    needs_consolidation = True

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.means = torch.zeros(0, self.features.width)

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Binary cross entropy of every class."""
        targets = F.one_hot(batch.targets.clamp_min(0), batch.logits.shape[1]).float()
        if batch.teacher_logits is not None:
            old = batch.teacher_logits.shape[1]
            taught = torch.where(self.head.current[:old], targets[:, :old], batch.teacher_logits.sigmoid())
            targets = torch.cat([taught, targets[:, old:]], dim=1)
        each = F.binary_cross_entropy_with_logits(batch.logits, targets, reduction="none").sum(1)
        return {"binary_cross_entropy": LossPart(each, "mean")}

    def rank_images(self, rows: Sequence[int] | NDArray[np.int64], images: Images) -> NDArray[np.float64]:
        """Ranks of images by herding, within each class; the smallest are kept longest.

        Args:
            rows: numbers of the images [n].
            images: this process's share of them.

        Returns:
            ranks [n], from 0; infinite for images that could not be read.
        """
        seen = record(self.features_of, images)
        features = seen.features.to(device_of_float64(seen.features.device)).double()
        rank: dict[int, int] = {}
        for label in seen.labels.unique().tolist():
            own = seen.labels == label
            ids = seen.ids[own].tolist()
            order = herding(F.normalize(features[own.to(features.device)], dim=1)).tolist()
            rank |= {ids[i]: number for number, i in enumerate(order)}
        return np.array([rank.get(int(row), np.inf) for row in rows])

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Compute the means of the features of the exemplars, `memory`; the task's `images` are not used.

        Raises:
            ValueError: no images are stored, or none of some class.
        """
        if memory is None:
            raise ValueError('"icarl" needs remembered images: set memory_size or memory_per_class')
        seen = record(self.features_of, memory)
        exemplars = ClassMeans(self.features.width)
        targets, _ = self.head.to_targets(seen.labels)
        features = seen.features.to(device_of_float64(seen.features.device)).double()
        exemplars.add(F.normalize(features, dim=1), targets, len(self.classes))
        if (exemplars.counts == 0).any():
            missing = [c for c, count in zip(self.classes, exemplars.counts.tolist(), strict=True) if not count]
            raise ValueError(f"the memory holds no image of classes {missing}: raise memory_size")
        self.means = F.normalize(exemplars.sums, dim=1).float().to(seen.features.device)

    def predict(self, features: Tensor, logits: Tensor) -> Tensor:
        """Cosines to the exemplar means [B, C]: the largest is the nearest mean."""
        if len(self.means) < logits.shape[1]:
            return logits
        return cosines(features, self.means)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Teacher and means."""
        return super().extra_tensors() | {"means": self.means}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_extra_tensors(tensors)
        self.means = tensors["means"]


def herding(features: Tensor) -> Tensor:
    """The order in which images keep the mean of those chosen nearest to the mean of all; features [n, D] -> places [n]."""
    mean, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool, device=features.device)
    order = []
    for count in range(1, len(features) + 1):
        distances = (mean - (total + features) / count).norm(dim=1)
        best = int(torch.where(left, distances, torch.inf).argmin())
        left[best] = False
        total += features[best]
        order.append(best)
    return torch.tensor(order)
