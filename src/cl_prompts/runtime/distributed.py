"""Sums and gathers over processes, with torch.distributed. With one process the functions return their argument."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_number() -> int:
    """Number of this process in the default process group; 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, without gradient."""
    if world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_processes(values: Tensor) -> list[Tensor]:
    """A tensor's value on every process, in the order of ranks; lengths may differ. Without gradient."""
    if world_size() == 1:
        return [values]
    length = torch.tensor([len(values)], device=values.device)
    lengths = [torch.zeros_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = values.new_zeros((longest, *values.shape[1:]))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return [part[: int(n)] for part, n in zip(parts, lengths, strict=True)]


def sum_with_gradient(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, with gradient: that of `gather_with_gradient(values[None]).sum(0)`."""
    return values if world_size() == 1 else _Sum.apply(values)


def gather_with_gradient(values: Tensor) -> Tensor:
    """The rows of all processes, in the order of ranks, with gradient. All processes must have the same number of rows.

    The backward sums the gradients of all processes. So if all processes compute the same loss from these rows and average
    their parameters' gradients, as DDP does, the result is the gradient of that loss.
    """
    return values if world_size() == 1 else _Gather.apply(values)


class _Sum(torch.autograd.Function):
    """Forward and backward: the sum over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_processes(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient.contiguous())


class _Gather(torch.autograd.Function):
    """Forward: the rows of all processes. Backward: this process's rows of the gradient summed over processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, values.contiguous())
        ctx.rows = len(values)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank() * ctx.rows :][: ctx.rows]
