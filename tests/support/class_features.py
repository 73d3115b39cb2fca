"""Features of classes that are known exactly, and what tests of the classifiers made from features do with them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_prompts.heads import ClassGaussians
from cl_prompts.heads.incremental import IncrementalHead


WIDTH = 6
TASKS = [[0, 1], [2, 3, 4], [5]]


def images(targets: Sequence[int], per_class: int = 30, seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Features of correlated classes far from the origin, shuffled, and their targets."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(targets))
    parts = []
    for column in targets:
        own = torch.Generator().manual_seed(column)
        mean, mix = 3 + torch.randn(width, generator=own), torch.randn(width, width, generator=own)
        noise = torch.randn(2, per_class, width, generator=generator)
        parts.append(mean + 0.4 * noise[0] @ mix + 0.3 * noise[1])
    order = torch.randperm(per_class * len(targets), generator=generator)
    return torch.cat(parts)[order], torch.tensor(list(targets)).repeat_interleave(per_class)[order]


def learnt(classifier: Any, tasks: Sequence[Sequence[int]] = TASKS, **more: Any) -> Any:
    """All tasks, whose features do not change."""
    for task in tasks:
        features, targets = images(task)
        classifier.begin_task(task)
        classifier.fit(features, targets, features if classifier.needs_before else None, **more)
    return classifier


def everything(tasks: Sequence[Sequence[int]] = TASKS) -> tuple[np.ndarray, np.ndarray]:
    found = [images(task) for task in tasks]
    return torch.cat([f for f, _ in found]).double().numpy(), torch.cat([c for _, c in found]).numpy()


def trained_head(classes: int = 6, width: int = WIDTH, scale: float | None = None) -> IncrementalHead:
    torch.manual_seed(4)
    head = IncrementalHead(width, scale)
    head.expand(list(range(classes)), list(range(classes)))
    return head


def affine(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
    return matrix.double(), torch.randn(WIDTH, generator=generator).double()


def gaussians_of(kind: str, features: Tensor, targets: Tensor, task: Sequence[int], **more: Any) -> ClassGaussians:
    gaussians = ClassGaussians(WIDTH, kind, **more)
    gaussians.begin_task(task)
    gaussians.add(features, targets)
    return gaussians
