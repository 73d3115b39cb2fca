"""What several processes decide together. Torch only; with one process everything returns its argument."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


def gather_with_gradient(values: Tensor) -> Tensor:
    """A tensor's rows on all processes, in the order of ranks; every process brings as many. Gradients find their way back.

    Processes that compute the same loss from these rows, and average their gradients as DDP does, get the gradient of that
    loss once.
    """
    return values if world_size() == 1 else _Gather.apply(values)


class _Gather(torch.autograd.Function):
    """All rows forward; backward, each process's own rows of the summed gradient."""

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
