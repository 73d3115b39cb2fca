"""Whose task is this image? That of the class whose un-prompted features it fits best. Shared by the methods.

With the mean mu_c of each class, and the images' covariance S around their own class's mean, which all classes share:

    "mean":        score of a class = cosine(q, mu_c)
    "covariance":  score of a class = q' P mu_c - mu_c' P mu_c / 2,   P = inverse of (1 - r) S + r * trace(S) / D * I

The second, the linear discriminant with equal priors, is -1/2 of the squared Mahalanobis distance but for a term that all
classes share (Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR-W 2020). A
task scores as its best class does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.methods.shared.selection import normalized
from cl_prompts.runtime.distributed import sum_over_processes


class ClassPrototypes(nn.Module):
    """Statistics of un-prompted features, saved with the adapter: sums, so that neither order nor batches matter.

    Args:
        width: size D of the features.
        statistics: "mean" or "covariance".
        shrinkage: r of the shared covariance in (0, 1]; None: `oas_shrinkage`.

    Attributes:
        sum: sums of features, for each class of each task, float64 [rows, D].
        count: images in each sum, int64 [rows].
        products: sum of q q' over the images of all rows, float64 [D, D]; for "covariance" only.
        of: (task, head column) of each row; a class that comes back in a later task gets a row there.

    On Apple's devices, which lack float64, the sums are float32; everywhere else float64.
    """

    sum: Tensor
    count: Tensor
    products: Tensor

    def __init__(self, width: int, statistics: str = "mean", shrinkage: float | None = None) -> None:
        super().__init__()
        self.statistics = statistics
        self.shrinkage = shrinkage
        self.register_buffer("sum", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(0, dtype=torch.int64))
        if statistics == "covariance":
            self.register_buffer("products", torch.zeros(width, width, dtype=torch.float64))
        self.of: list[tuple[int, int]] = []

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(self.count).device.type == "mps":
            for name, sums in self._sums():
                setattr(self, name, sums.float())
        super()._apply(fn, recurse)
        for name, sums in self._sums():
            if sums.device.type != "mps":
                setattr(self, name, sums.double())
        return self

    def _sums(self) -> list[tuple[str, Tensor]]:
        return [(name, buffer) for name, buffer in self.named_buffers() if name != "count"]

    def begin_task(self, columns: Sequence[int], task: int) -> None:
        """Open rows for the classes of task number `task`, which have the head `columns`."""
        self.make_room([columns], task)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """Open rows for the classes of `tasks`, numbered from `first`, each by its head columns."""
        self.of += [(number, column) for number, columns in enumerate(tasks, start=first) for column in columns]
        rows = len(self.of) - len(self.count)
        self.sum = torch.cat([self.sum, self.sum.new_zeros(rows, self.sum.shape[1])])
        self.count = torch.cat([self.count, self.count.new_zeros(rows)])

    def add(self, query: Tensor, columns: Tensor, counted: Tensor) -> None:
        """Add images of the newest task, over all processes.

        Args:
            query: un-prompted features [B, D].
            columns: head column of each image's class [B]; images of no class of that task are left out.
            counted: True where an image counts [B].
        """
        rows = [row for row, (task, _) in enumerate(self.of) if task == self.of[-1][0]]
        own = torch.tensor([self.of[row][1] for row in rows], device=columns.device)
        member = (columns[:, None] == own) & counted[:, None]
        # Padding may hold anything, and 0 * inf is no number.
        features = torch.where(member.any(1, keepdim=True), query, 0.0).to(self.sum.dtype)
        self.sum[rows] += sum_over_processes(member.T.to(features) @ features)
        self.count[rows] += sum_over_processes(member.sum(0))
        if self.statistics == "covariance":
            self.products += sum_over_processes(features.T @ features)

    def covariance(self) -> Tensor:
        """The shared covariance, shrunk: float64 [D, D]; the identity while it is zero."""
        total, products, count = _float64(self.sum), _float64(self.products), _float64(self.count)
        # Rows that hold no image sum up to zero. Each mean takes a degree of freedom from the images.
        freedom = (count - 1).clamp_min(0).sum()
        scatter = products - total.T @ (total / count.clamp_min(1)[:, None])
        covariance = scatter / freedom.clamp_min(1)
        scale = covariance.trace() / len(covariance)
        shrinkage = oas_shrinkage(covariance, freedom) if self.shrinkage is None else self.shrinkage
        identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        shrunk = (1 - shrinkage) * covariance + shrinkage * scale * identity
        # Rounding leaves a trace of images that are all at their class's mean.
        return torch.where(scale > 1e-12 * products.trace() / count.sum().clamp_min(1), shrunk, identity)

    def class_scores(self, query: Tensor) -> Tensor:
        """How well each feature of `query` [B, D] fits each class of each task: [B, rows]; -inf where no image was seen.

        Raises:
            ValueError: the statistics give no covariance that can be inverted.
        """
        means = self.sum / self.count.clamp_min(1)[:, None]
        if self.statistics == "mean":
            scores = normalized(query) @ normalized(means.to(query.dtype)).T
        else:
            # Worked out anew for every batch: D^3 / 3 steps cost a fraction of one image's pass through the backbone.
            means = _float64(means)
            factor, failed = torch.linalg.cholesky_ex(self.covariance())
            if failed:
                raise ValueError(
                    f"covariance_shrinkage={self.shrinkage}: the classes' shared covariance cannot be inverted; shrink it "
                    "more, or leave that to None"
                )
            weight = torch.cholesky_solve(means.T, factor)
            exact = _float64(query) @ weight - (means.T * weight).sum(0) / 2
            scores = exact.to(query.dtype).to(query.device)
        return scores.masked_fill(self.count == 0, -math.inf)

    def task_scores(self, query: Tensor) -> Tensor:
        """Score of each task's best class for each feature of `query` [B, D]: [B, tasks]; -inf where no image was seen."""
        scores = self.class_scores(query)
        tasks = torch.tensor([task for task, _ in self.of], device=query.device)
        best = scores.new_full((len(query), self.of[-1][0] + 1), -math.inf)
        return best.scatter_reduce(1, tasks.expand(len(query), -1), scores, "amax")

    def nearest_tasks(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` best tasks of each feature of `query` [B, D]: [B, k], best first, of equal ones the lower number.

        And `task_scores`.
        """
        scores = self.task_scores(query)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k], scores

    def nearest_task(self, query: Tensor) -> Tensor:
        """The best task of each feature of `query` [B, D]: [B]."""
        return self.nearest_tasks(query, 1)[0][:, 0]


def oas_shrinkage(covariance: Tensor, images: Tensor) -> Tensor:
    """How far to shrink a covariance [D, D] of so many Gaussian vectors towards the scaled identity: in (0, 1].

    OAS: Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 58(10), 2010, eq. 23. Unlike Ledoit
    and Wolf's it needs no fourth moments, so it follows from running sums.
    """
    width = len(covariance)
    square, trace2 = covariance.square().sum(), covariance.trace().square()
    below = (images + 1 - 2 / width) * (square - trace2 / width)
    return torch.where(below > 0, ((1 - 2 / width) * square + trace2) / below, 1.0).clamp(max=1)


def _float64(values: Tensor) -> Tensor:
    """A tensor in float64, on the CPU where its device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
