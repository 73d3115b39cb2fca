"""Mean queries of tasks, and how similar tasks are by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_prompts.methods.shared.per_task import TaskTensors
from cl_prompts.methods.shared.selection import cosine_scores
from cl_prompts.runtime.gathered import GatheredStatistics


class TaskMeans(TaskTensors, GatheredStatistics):
    """Sums of the queries of each task, saved with the adapter.

    Args:
        width: size D of a query.

    Attributes:
        sum: of the task's images, each counted once, float32 [tasks, D].
        count: number of these images, int64 [tasks].
    """

    sum: Tensor
    count: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("sum", torch.zeros(0, width))
        self.register_buffer("count", torch.zeros(0, dtype=torch.int64))

    def begin_task(self) -> None:
        """Add the next task's row."""
        self._add_rows(1)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """See `TaskTensors`."""
        self._add_rows(len(tasks))

    def _add_rows(self, number: int) -> None:
        self.sum = torch.cat([self.sum, self.sum.new_zeros(number, self.sum.shape[1])])
        self.count = torch.cat([self.count, self.count.new_zeros(number)])

    def add(self, query: Tensor, first_seen: Tensor) -> None:
        """Add the queries [B, D] of the images where `first_seen` [B] is True; other processes' with `gather`."""
        self.wait(torch.where(first_seen[:, None], query.float(), 0.0).sum(0), first_seen.sum())

    def add_sums(self, *sums: Tensor) -> None:
        """See `GatheredStatistics`."""
        self.sum[-1] += sums[0]
        self.count[-1] += sums[1]

    def similarity(self) -> Tensor:
        """Cosines of the tasks' means, at least 0 [tasks, tasks]; 0 of a task with itself, and of one without images."""
        cosines = cosine_scores(self.sum, self.sum).clamp(0, 1)
        return cosines * (1 - torch.eye(len(cosines), device=cosines.device))
