"""Classifier alignment: the trained head is trained again on features drawn from Gaussians of all classes.

SLCA (Zhang et al., ICCV 2023); also the task-adaptive prediction of HiDe-Prompt and NoRGa, whose released code uses SGD
with lr 0.005, momentum 0.9, weight decay 5e-4 and a cosine schedule for 30 epochs. No image is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.gaussians import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.retrained import RetrainedHead


SHORTEST = 1e-3  # length of a feature, in that of ones


def align(
    head: IncrementalHead,
    gaussians: ClassGaussians,
    *,
    epochs: int = 30,
    samples: int = 100,
    batch_size: int = 256,
    lr: float = 5e-3,
    seed: int = 0,
) -> None:
    """Train a head in place, with all classes in the loss, on features that are drawn again for every epoch.

    SLCA, Zhang et al., ICCV 2023; defaults are those of HiDe-Prompt's released code.

    Args:
        head: the classifier, with a logit for every class.
        gaussians: of the features of the classes.
        epochs: of SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule.
        samples: features per class in an epoch.
        batch_size: features per step.
        lr: initial learning rate.
        seed: of the drawn features and their order.
    """
    generator = torch.Generator().manual_seed(seed)
    flags = [p.requires_grad for p in head.parameters()]
    head.requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    sampler = gaussians.sampler(own=0.5, spherical=1e-4)
    with torch.enable_grad():
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            features, targets = sampler.draw(samples, generator)
            order = torch.randperm(features.shape[0], generator=generator).to(features.device)
            for rows in order.split(batch_size):
                loss = F.cross_entropy(head(features[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    optimizer.zero_grad()
    for parameter, flag in zip(head.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


class AlignedClassifier(RetrainedHead):
    """A copy of the trained head, aligned (`align`) after every task: SLCA, Zhang et al., ICCV 2023.

    Args:
        width: size D of the features.
        kind: of `ClassGaussians`.
        rank: of `ClassGaussians`, for "low_rank".
        drift: how the statistics of old classes follow the features: "none", "shift" or "affine" (`fit_map`).
        seed: of the drawn features.
        save_statistics: save what learning further tasks needs.
        options: of `align`.
    """

    def __init__(
        self,
        width: int,
        *,
        kind: str = "low_rank",
        rank: int | None = None,
        drift: str = "affine",
        seed: int = 0,
        save_statistics: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(save_statistics=save_statistics, drift=drift)
        self.gaussians = ClassGaussians(width, kind, rank=rank, save=save_statistics)
        self.seed, self.options = seed, options

    def make_room(self) -> None:
        """Allocate the rows of the Gaussians."""
        self.gaussians.make_room()

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add rows for the task's classes."""
        super().begin_task(class_indices)
        self.gaussians.begin_task(class_indices)

    def _collect(self, features: Tensor, targets: Tensor, before: Tensor | None) -> None:
        if before is not None and self.needs_before and int(self.fitted):
            self.gaussians.move(self._map(before, features))
        self.gaussians.add(features, targets, self.seed)

    def _train(self, head: IncrementalHead, features: Tensor, targets: Tensor) -> None:
        align(head, self.gaussians, seed=self.seed * 1_000_003 + self.num_tasks, **self.options)

    def scale(self, features: Tensor) -> Tensor:
        """Length of each of `features` [B, D], divided by that of ones: [B].

        Logits W x + b grow with it. Where some tasks' features are longer than those of others, no one temperature would
        calibrate both.
        """
        return features.float().square().mean(1).sqrt().clamp_min(SHORTEST)

    def _group(self, groups: ClassGroups, head: IncrementalHead) -> None:
        if groups.merges:  # the rows of the head were merged to their mean, which answers for neither
            self.check_statistics()
            align(head, self.gaussians, seed=self.seed * 1_000_003 + self.num_tasks, **self.options)
