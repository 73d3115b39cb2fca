"""Task inference by class statistics: an image belongs to the task of the class that its un-prompted feature fits best.

With the mean mu_c of each class and the covariance S of the images around their class means, shared by all classes:

    "mean":        score of a class = cosine(q, mu_c)
    "covariance":  score of a class = q' P mu_c - mu_c' P mu_c / 2,   P = inverse of (1 - r) S + r * trace(S) / D * I

The second is the linear discriminant with equal priors: -1/2 of the squared Mahalanobis distance up to a term that is the
same for all classes (Hayes & Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis", CVPR-W
2020). The score of a task is that of its best class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.class_means import class_means, class_sums
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.methods.shared.per_task import TaskTensors
from cl_prompts.methods.shared.selection import normalized
from cl_prompts.runtime.gathered import GatheredStatistics


class ClassPrototypes(TaskTensors, GatheredStatistics):
    """Sums of un-prompted features by class, saved with the adapter. They do not depend on the order of images or tasks.

    Args:
        width: size D of the features.
        statistics: "mean" or "covariance".
        shrinkage: r in (0, 1] of the shared covariance; None: `oas_shrinkage`.

    Attributes:
        sum: sum of the features of each class of each task, float64 [rows, D].
        count: number of images in each sum, int64 [rows].
        products: sum of q q' over the images of all rows, float64 [D, D]; only for "covariance".
        rows: (task, class index) of each row. A class that returns in a later task has a row for each task.
        num_tasks: number of tasks, with those all of whose classes were forgotten.

    On Apple's devices, which have no float64, the sums are float32.
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
        self.rows: list[tuple[int, int]] = []
        self.num_tasks = 0

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

    def begin_task(self, class_indices: Sequence[int], task: int) -> None:
        """Add rows for the classes, `class_indices`, of task number `task`."""
        self.make_room([class_indices], task)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """See `TaskTensors`."""
        self.rows += [(number, index) for number, task in enumerate(tasks, start=first) for index in task]
        self.num_tasks = first + len(tasks)
        added = len(self.rows) - self.count.shape[0]
        self.sum = torch.cat([self.sum, self.sum.new_zeros(added, self.sum.shape[1])])
        self.count = torch.cat([self.count, self.count.new_zeros(added)])

    def group_classes(self, groups: ClassGroups) -> None:
        """Keep the rows of the classes in `groups`; those of one task that are merged become one, exactly.

        Of the shared covariance the part of a forgotten class is not known: it stays the average over all images so far.
        """
        by_row = groups.of_rows(self.rows)
        rows = list(by_row.values())
        summed = torch.stack([self.sum[group].sum(0) for group in rows]) if rows else self.sum[:0]
        counts = torch.stack([self.count[group].sum(0) for group in rows]) if rows else self.count[:0]
        kept = [row for group in rows for row in group]
        if self.statistics == "covariance" and len(kept) < len(self.rows):
            before, after = (self._scatter_and_freedom(row) for row in (slice(None), kept))
            within = before[0] * (after[1] / before[1].clamp_min(1))
            self.products = within + self.sum[kept].T @ class_means(self.sum[kept], self.count[kept])
        self.rows, self.sum, self.count = list(by_row), summed, counts

    def _scatter_and_freedom(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Sum of squares around the class means, [D, D], and its degrees of freedom, of some `rows`."""
        total, count = self.sum[rows], self.count[rows]
        return self.products - total.T @ class_means(total, count), (count - 1).clamp_min(0).sum()

    def add(self, query: Tensor, targets: Tensor, first_seen: Tensor) -> None:
        """Add images of the newest task; those of other processes with `gather`.

        Args:
            query: un-prompted features [B, D].
            targets: class index of each image [B]; images of other classes than that task's are left out.
            first_seen: True for the images to add [B].
        """
        classes = [self.rows[row][1] for row in self._newest_rows()]
        targets = torch.where(first_seen, targets, IGNORE_INDEX)
        sums = class_sums(query, targets, classes, dtype=self.sum.dtype)
        if self.statistics == "mean":
            self.wait(*sums)
        else:
            added = torch.isin(targets, torch.tensor(classes, device=targets.device))
            features = torch.where(added[:, None], query, 0.0).to(self.sum.dtype)
            self.wait(*sums, features.T @ features)

    def _newest_rows(self) -> list[int]:
        return [row for row, (task, _) in enumerate(self.rows) if task == self.num_tasks - 1]

    def add_sums(self, *sums: Tensor) -> None:
        """See `GatheredStatistics`; `sums` are those of features [C, D], counts [C] and products [D, D]."""
        rows = self._newest_rows()
        self.sum[rows] += sums[0]
        self.count[rows] += sums[1]
        if self.statistics == "covariance":
            self.products += sums[2]

    def covariance(self) -> Tensor:
        """The shared covariance after shrinkage, float64 [D, D]; the identity while it is zero."""
        total, products, count = _float64(self.sum), _float64(self.products), _float64(self.count)
        # Each class mean uses one degree of freedom. Rows without images have sum 0.
        freedom = (count - 1).clamp_min(0).sum()
        scatter = products - total.T @ class_means(total, count)
        covariance = scatter / freedom.clamp_min(1)
        scale = covariance.trace() / covariance.shape[0]
        shrinkage = oas_shrinkage(covariance, freedom) if self.shrinkage is None else self.shrinkage
        identity = torch.eye(covariance.shape[0], dtype=covariance.dtype, device=covariance.device)
        shrunk = (1 - shrinkage) * covariance + shrinkage * scale * identity
        # If all images lie at their class means, rounding leaves a small trace.
        return torch.where(scale > 1e-12 * products.trace() / count.sum().clamp_min(1), shrunk, identity)

    def class_scores(self, query: Tensor) -> Tensor:
        """Score of each class of each task for each feature of `query` [B, D]: [B, rows]; -inf for a class without images.

        Raises:
            ValueError: the covariance cannot be inverted, or the statistics of this task have not been gathered.
        """
        self.check_gathered()
        # In float64, rounded once: a class that comes back with the same images has equal scores in two tasks. The last
        # bits of float32 products depend on the batch, and so would the task. On Apple's devices, where
        # sums are float32, they may differ.
        exact, means = _float64(query), _float64(class_means(self.sum, self.count))
        if self.statistics == "mean":
            exact = normalized(exact) @ normalized(means).T
        else:
            # Computed for every batch: D^3 / 3 operations are a fraction of one image's pass through the backbone.
            factor, failed = torch.linalg.cholesky_ex(self.covariance())
            if not torch.compiler.is_compiling() and failed:  # a graph cannot branch on a tensor
                raise ValueError(
                    f"covariance_shrinkage={self.shrinkage}: the classes' shared covariance cannot be inverted; use a "
                    "larger value, or None"
                )
            weight = torch.cholesky_solve(means.T, factor)
            exact = exact @ weight - (means.T * weight).sum(0) / 2
        scores = exact.to(query.dtype).to(query.device)
        return scores.masked_fill(self.count == 0, -math.inf)

    def task_scores(self, query: Tensor) -> Tensor:
        """Score of each task's best class for `query` [B, D]: [B, tasks]; -inf for a task without images."""
        scores = self.class_scores(query)
        tasks = torch.tensor([task for task, _ in self.rows], device=query.device)
        best = scores.new_full((query.shape[0], self.num_tasks), -math.inf)
        return best.scatter_reduce(1, tasks.expand(query.shape[0], -1), scores, "amax")

    def nearest_tasks(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` best tasks of each feature of `query` [B, D], and the scores of all tasks.

        Returns:
            Task numbers [B, k], or fewer if fewer tasks have classes, best first, of equal scores the lower number; and
            `task_scores` [B, tasks].
        """
        scores = self.task_scores(query)
        k = min(k, max(1, len({task for task, _ in self.rows})))
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k], scores

    def nearest_task(self, query: Tensor) -> Tensor:
        """The best task of each feature of `query` [B, D]: [B]."""
        return self.nearest_tasks(query, 1)[0][:, 0]


def oas_shrinkage(covariance: Tensor, images: Tensor) -> Tensor:
    """Shrinkage in (0, 1] of a covariance [D, D], estimated from so many `images`, towards the scaled identity.

    OAS: Chen et al., "Shrinkage Algorithms for MMSE Covariance Estimation", IEEE TSP 58(10), 2010, eq. 23. Unlike
    Ledoit and Wolf's it needs no fourth moments, so running sums suffice.
    """
    width = covariance.shape[0]
    square, trace2 = covariance.square().sum(), covariance.trace().square()
    below = (images + 1 - 2 / width) * (square - trace2 / width)
    return torch.where(below > 0, ((1 - 2 / width) * square + trace2) / below, 1.0).clamp(max=1)


def _float64(values: Tensor) -> Tensor:
    """A tensor in float64; on the CPU if its device has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()
