"""Tensors that a pool keeps for each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.heads.class_groups import ClassGroups


class TaskTensors(nn.Module, ABC):
    """A part of a pool that has tensors for each task."""

    @abstractmethod
    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """Allocate the tensors of `tasks` (class indices of each), numbered from `first`; values come from a file."""

    def group_classes(self, groups: ClassGroups) -> None:
        """Forget and merge classes, as `groups` says; for parts with rows by class."""


class PerTask(TaskTensors):
    """One tensor per task. The current one is trained; those of earlier tasks are frozen in a buffer and stay bit-equal.

    Args:
        first: the first task's tensor.
        by_row: the earlier tensors of one row (of a layer) lie next to each other in memory, so that `earlier[:, row]` of
            many tasks is read without a copy.

    Attributes:
        current: the current task's tensor, trainable.
        earlier: those of earlier tasks, [tasks - 1, *size].
    """

    earlier: Tensor

    def __init__(self, first: nn.Parameter, *, by_row: bool = False) -> None:
        super().__init__()
        self.current = first
        self._by_row = by_row
        self.register_buffer("earlier", torch.zeros(0, *first.shape))

    def next(self, start: Callable[[Tensor], Tensor] | None = None) -> None:
        """Freeze the current tensor and start the next task's.

        Args:
            start: makes the new tensor from all earlier ones [tasks, *size]; None: a copy of the newest.
        """
        closed = self.current.detach()
        # PEFT's low_cpu_mem_usage builds parameters on the meta device, but not buffers.
        self._append(self.earlier.to(closed.device), closed[None])
        fresh = closed.clone() if start is None else start(self.earlier)
        self.current = nn.Parameter(fresh.to(closed), requires_grad=self.current.requires_grad)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """See `TaskTensors`."""
        self._append(self.earlier, self.current.detach().expand(len(tasks), *self.current.shape))

    def _append(self, earlier: Tensor, closed: Tensor) -> None:
        if self._by_row:
            self.earlier = torch.cat([earlier.transpose(0, 1), closed.transpose(0, 1)], 1).transpose(0, 1)
        else:
            self.earlier = torch.cat([earlier, closed])

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._by_row:  # files hold the numbers in the order of the shape
            destination[f"{prefix}earlier"] = destination[f"{prefix}earlier"].contiguous()

    def all(self) -> Tensor:
        """The tensors of all tasks [tasks, *size], the current one's with gradient."""
        return torch.cat([self.earlier, self.current[None]])

    def of_tasks(self, ids: Tensor, row: int) -> Tensor:
        """Row number `row` of the tensors of tasks `ids` [n]: [n, *size[1:]]."""
        return chosen(ids, self.earlier[:, row], self.current[row])


def chosen(ids: Tensor, earlier: Tensor, current: Tensor) -> Tensor:
    """`torch.cat([earlier, current[None]])[ids]` without a copy of all tasks' tensors: [n, *size].

    Args:
        ids: numbers of tasks [n].
        earlier: tensors of the earlier tasks [tasks - 1, *size].
        current: that of the current task.
    """
    newest = earlier.shape[0]
    rows = current.expand(ids.shape[0], *current.shape)
    if not newest:
        return rows
    return torch.where((ids == newest).view(-1, *[1] * current.dim()), rows, earlier[ids.clamp(max=newest - 1)])
