"""Whose task is this image? That of the nearest class mean of un-prompted features. Shared by the methods."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_prompts.collectives import sum_over_processes
from cl_prompts.pools.selection import normalized


class ClassPrototypes(nn.Module):
    """Means of un-prompted features, one for each class of each task, saved with the adapter.

    Args:
        width: size D of the features.

    Attributes:
        sum: sums of features, float64 [rows, D].
        count: images in each sum, int64 [rows].
        of: (task, head column) of each row; a class that comes back in a later task gets a row there.
    """

    sum: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(0, width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(0, dtype=torch.int64))
        self.of: list[tuple[int, int]] = []

    def begin_task(self, columns: Sequence[int], task: int) -> None:
        """Open rows for the classes of task number `task`, which have these head columns."""
        rows = len(columns)
        self.sum = torch.cat([self.sum, self.sum.new_zeros(rows, self.sum.shape[1])])
        self.count = torch.cat([self.count, self.count.new_zeros(rows)])
        self.of += [(task, column) for column in columns]

    def add(self, query: Tensor, columns: Tensor, counted: Tensor) -> None:
        """Add images of the newest task, over all processes.

        Args:
            query: un-prompted features [B, D].
            columns: head column of each image's class [B].
            counted: True where an image counts [B].
        """
        rows = [row for row, (task, _) in enumerate(self.of) if task == self.of[-1][0]]
        own = torch.tensor([self.of[row][1] for row in rows], device=columns.device)
        member = (columns[:, None] == own) & counted[:, None]
        sums = sum_over_processes(member.T.double() @ query.double())
        counts = sum_over_processes(member.sum(0))
        self.sum[rows] += sums
        self.count[rows] += counts

    def task_scores(self, query: Tensor) -> Tensor:
        """Cosine of each feature [B, D] with the nearest class mean of each task: [B, tasks]; -inf where none was seen."""
        means = self.sum / self.count.clamp_min(1)[:, None]
        similarity = normalized(query) @ normalized(means.to(query.dtype)).T
        similarity = similarity.masked_fill(self.count == 0, -math.inf)
        tasks = torch.tensor([task for task, _ in self.of], device=query.device)
        scores = similarity.new_full((len(query), self.of[-1][0] + 1), -math.inf)
        return scores.scatter_reduce(1, tasks.expand(len(query), -1), similarity, "amax")

    def nearest_tasks(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest tasks of each feature [B, D], nearest first (ties: the lower number): [B, k]; and `task_scores`."""
        scores = self.task_scores(query)
        return scores.argsort(dim=1, descending=True, stable=True)[:, :k], scores

    def nearest_task(self, query: Tensor) -> Tensor:
        """The nearest task of each feature [B, D]: [B]."""
        return self.nearest_tasks(query, 1)[0][:, 0]
