"""Tensors of which each task gets its own: the current one is trained, earlier ones are frozen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PerTask(nn.Module):
    """One tensor per task. Earlier tasks' lie in a buffer, which no optimizer knows: they stay bit-equal.

    Args:
        first: the first task's tensor.

    Attributes:
        current: the current task's, trainable.
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

    def make_room(self, tasks: int) -> None:
        """As `next` for so many `tasks`, for values that come from a file."""
        self.earlier = torch.cat([self.earlier, self.current.detach().expand(tasks, *self.current.shape)])

    def all(self) -> Tensor:
        """The tensors of all tasks [tasks, *size], the current one's with gradient."""
        return torch.cat([self.earlier, self.current[None]])
