"""Tensors that a pool keeps for each task."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

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

    Attributes:
        current: the current task's tensor, trainable.
        earlier: those of earlier tasks, [tasks - 1, *size].
    """

    earlier: Tensor

    def __init__(self, first: nn.Parameter) -> None:
        super().__init__()
        self.current = first
        self.register_buffer("earlier", torch.zeros(0, *first.shape))

    def next(self, start: Callable[[Tensor], Tensor] | None = None) -> None:
        """Freeze the current tensor and start the next task's.

        Args:
            start: makes the new tensor from all earlier ones [tasks, *size]; None: a copy of the newest.
        """
        closed = self.current.detach()
        # PEFT's low_cpu_mem_usage builds parameters on the meta device, but not buffers.
        self.earlier = torch.cat([self.earlier.to(closed.device), closed[None]])
        fresh = closed.clone() if start is None else start(self.earlier)
        self.current = nn.Parameter(fresh.to(closed), requires_grad=self.current.requires_grad)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """See `TaskTensors`."""
        self.earlier = torch.cat([self.earlier, self.current.detach().expand(len(tasks), *self.current.shape)])

    def all(self) -> Tensor:
        """The tensors of all tasks [tasks, *size], the current one's with gradient."""
        return torch.cat([self.earlier, self.current[None]])
