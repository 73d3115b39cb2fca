"""Virtual outlier regularization: the trained head is trained further, with outliers that it must not be sure of.

OVOR: Huang et al., "OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning",
ICLR 2024. No image is kept. For features f of the task's images, E(v) = -logsumexp of the current task's logits of v:

    loss = CE(f) + weight * (huber(relu(E(f) - energy_in)) + huber(relu(energy_out - E(outlier))))

Outliers are drawn around features at the boundary: those far from their neighbors (Tao et al., "Non-parametric Outlier
Synthesis", ICLR 2023). The released code forgets to add its noise to these features, so that its outliers are noise around
zero; here they are as the paper describes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.heads.incremental import IncrementalHead
from cl_prompts.heads.retrained import RetrainedHead


CHUNK = 2048  # candidates that are compared with the features at once
BATCH_SIZE = 128


def farthest(points: Tensor, index: Tensor, neighbors: int, count: int) -> Tensor:
    """Indices of the `count` points that are farthest from their K-th nearest vector of an index, farthest first.

    Args:
        points: [m, D].
        index: [n, D]; a point that is in the index is its own first neighbor.
        neighbors: K; the n-th nearest with fewer vectors.
        count: number of points; all with fewer points.
    """
    rank = min(neighbors, len(index))
    distances = [torch.cdist(part, index).kthvalue(rank, dim=1).values for part in points.split(CHUNK)]
    return torch.cat(distances).topk(min(count, len(points))).indices


def virtual_outliers(
    features: Tensor, offsets: Tensor, *, neighbors: int, boundary: int, spread: float, count: int
) -> Tensor:
    """Outliers around the boundary of a task's features, farthest first.

    Args:
        features: of all images of the task [n, D].
        offsets: standard normal draws [m, D].
        neighbors: K of the distance to the K-th neighbor.
        boundary: number of features that outliers are drawn around.
        spread: factor of the draws.
        count: number of outliers.

    Returns:
        [count, D], or fewer if there are fewer candidates (boundary * m).
    """
    index = F.normalize(features, dim=1)
    edge = features[farthest(index, index, neighbors, boundary)]
    candidates = (edge[:, None] + spread * offsets).flatten(0, 1)
    return candidates[farthest(candidates, index, neighbors, count)]


def energy_loss(logits: Tensor, of_outliers: Tensor, energy_in: float, energy_out: float) -> Tensor:
    """The two Huber terms, a scalar, for logits of the current task's classes: of images [n, C], and of outliers [m, C]."""
    inside, outside = (-z.logsumexp(1) for z in (logits, of_outliers))
    terms = (F.relu(inside - energy_in), F.relu(energy_out - outside))
    return torch.stack([F.huber_loss(term, torch.zeros_like(term)) for term in terms]).sum()


def regularize_head(
    head: IncrementalHead,
    features: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    weight: float = 0.1,
    energy_in: float = -15.0,
    energy_out: float = -3.0,
    spread: float = 0.1,
    neighbors: int = 50,
    boundary: int = 50,
    draws: int = 600,
    per_class: int = 40,
    seed: int = 0,
) -> None:
    """Train the head's rows of the current task in place, by Adam, with outliers that are drawn again for every epoch.

    Args:
        head: the trained head; `head.current` are the task's classes.
        features: of all images of the task [n, D].
        targets: class index of each image [n].
        epochs: number of epochs.
        learning_rate: of Adam, constant.
        weight: of the energy loss.
        energy_in: energy that images should be below.
        energy_out: energy that outliers should be above.
        spread: factor of the draws.
        neighbors: K of the distance to the K-th neighbor.
        boundary: number of features that outliers are drawn around.
        draws: offsets around each boundary feature.
        per_class: outliers for each class of the task.
        seed: of the draws and the order of the images.
    """
    generator = torch.Generator().manual_seed(seed)
    current, flags = head.current, [p.requires_grad for p in head.parameters()]
    head.requires_grad_(True)
    parameters = list(head.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(epochs):
        offsets = torch.randn(draws, features.shape[1], generator=generator).to(features)
        count = per_class * int(current.sum())
        outliers = virtual_outliers(features, offsets, neighbors=neighbors, boundary=boundary, spread=spread, count=count)
        batches = torch.randperm(len(features), generator=generator).to(features.device).split(BATCH_SIZE)
        size = max(len(outliers) // len(batches), 1)
        for rows, around in zip(batches, outliers.split(size), strict=False):
            with torch.enable_grad():
                logits = head(features[rows])
                loss = F.cross_entropy(logits.masked_fill(~current, float("-inf")), targets[rows])
                energy = energy_loss(logits[:, current], head(around)[:, current], energy_in, energy_out)
                (loss + weight * energy).backward()
            optimizer.step()
            optimizer.zero_grad()
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)


class OutlierRegularizedHead(RetrainedHead):
    """A copy of the trained head, regularized by virtual outliers (`regularize_head`) after every task.

    Args:
        seed: of the draws.
        options: of `regularize_head`.
    """

    def __init__(self, *, seed: int = 0, **options: Any) -> None:
        super().__init__(save_statistics=True, drift="none")
        self.seed, self.options = seed, options

    def _train(self, head: IncrementalHead, features: Tensor, targets: Tensor) -> None:
        regularize_head(head, features, targets, seed=self.seed * 1_000_003 + self.num_tasks, **self.options)
