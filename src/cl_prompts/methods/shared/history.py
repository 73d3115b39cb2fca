"""How often each prompt was used; Hash's routing penalty (HDR) and update factor (HGM), which depend on it.

Hash, CVPR 2026 (arXiv 2601.20894). L2P eq. 4 uses the same counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_prompts.methods.shared.per_task import TaskTensors
from cl_prompts.methods.shared.selection import histogram
from cl_prompts.runtime.gathered import GatheredStatistics


class ActivationHistory(TaskTensors, GatheredStatistics):
    """Activation counts of each task, saved with the adapter.

    Args:
        rows: shape of the counts between the axes of tasks and prompts, for instance (layers,) or ().
        pool_size: number of prompts M.

    Attributes:
        counts: how many images of a task used a prompt, int64 [tasks, *rows, M].
    """

    counts: Tensor

    def __init__(self, rows: tuple[int, ...], pool_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(0, *rows, pool_size, dtype=torch.int64))

    def begin_task(self) -> None:
        """Add the next task's row."""
        self._add_rows(1)

    def make_room(self, tasks: Sequence[Sequence[int]], first: int) -> None:
        """See `TaskTensors`."""
        self._add_rows(len(tasks))

    def _add_rows(self, count: int) -> None:
        self.counts = torch.cat([self.counts, self.counts.new_zeros(count, *self.counts.shape[1:])])

    def widen(self, count: int) -> None:
        """Add `count` prompts, which no task has used so far."""
        self.counts = torch.cat([self.counts, self.counts.new_zeros(*self.counts.shape[:-1], count)], -1)

    def add(self, ids: Tensor, first_seen: Tensor) -> None:
        """Count the selections `ids` [B, *rows, k] of the images where `first_seen` [B] is True.

        Those of other processes are added with `gather`.
        """
        self.wait(histogram(ids, self.counts.shape[-1], first_seen))

    def add_sums(self, *sums: Tensor) -> None:
        """See `GatheredStatistics`; the only one of `sums` has the counts of the newest task [*rows, M]."""
        self.counts[-1] += sums[0]

    def before(self, task: int, decay: float = 1.0) -> Tensor:
        """Cumulative activations H at the end of task `task - 1`, float64 [*rows, M].

        Args:
            task: number of the task that starts then, from 0.
            decay: factor on a task's counts for each later task.
        """
        age = torch.arange(task - 1, -1, -1, dtype=self._dtype, device=self.counts.device)
        return torch.tensordot(decay**age, self.counts[:task].to(self._dtype), dims=1)

    def before_each(self, decay: float = 1.0, *, own: bool = False) -> Tensor:
        """`before(task, decay)` for every task so far, with one `decay`: float64 [tasks, *rows, M].

        Args:
            decay: as in `before`.
            own: include each task's own counts, as `before(task + 1, decay)` does.
        """
        task = torch.arange(self.counts.shape[0], dtype=self._dtype, device=self.counts.device)
        age = task[:, None] - (0 if own else 1) - task
        weight = torch.where(age >= 0, decay ** age.clamp_min(0), 0.0)
        return torch.tensordot(weight, self.counts.to(self._dtype), dims=1)

    @property
    def _dtype(self) -> torch.dtype:
        """float64, in which counts are exact. Apple's devices lack it; float32 is exact up to 16 million images."""
        return torch.float32 if self.counts.device.type == "mps" else torch.float64


def most_activated(history: Tensor, top: int) -> Tensor:
    """The set A_t as a mask: the `top` most activated prompts of H [..., M] that were used; ties: the lower number."""
    order = history.argsort(dim=-1, descending=True, stable=True)[..., :top]
    return torch.zeros_like(history, dtype=torch.bool).scatter(-1, order, True) & (history > 0)


def routing_penalty(history: Tensor, config: Any) -> Tensor:
    """HDR: the penalty phi(H) that is subtracted from a prompt's routing score, for H [..., M].

    "constant": delta for the most activated prompts, else 0 (the paper's default). "log": delta * log(1 + H).
    "power": delta * H^alpha. "none": 0.
    """
    if config.hdr == "constant":
        penalty = config.delta * most_activated(history, config.history_top).to(history.dtype)
    elif config.hdr == "log":
        penalty = config.delta * history.log1p()
    elif config.hdr == "power":
        penalty = config.delta * history.pow(config.alpha) * (history > 0)
    else:
        penalty = torch.zeros_like(history)
    return penalty.float()


def update_factor(history: Tensor, config: Any) -> Tensor:
    """HGM: the factor psi(H) in (0, 1] on a prompt's update, for H [..., M].

    "constant": beta for the most activated prompts, else 1 (the paper's default). "reciprocal": 1 / (1 + zeta H).
    "exponential": exp(-zeta H). "none": 1.
    """
    if config.hgm == "constant":
        factor = torch.where(most_activated(history, config.history_top), config.beta, 1.0)
    elif config.hgm == "reciprocal":
        factor = 1 / (1 + config.zeta * history)
    elif config.hgm == "exponential":
        factor = (-config.zeta * history).exp()
    else:
        factor = torch.ones_like(history)
    return factor.float()


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor: HGM as the paper writes it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor) -> Tensor:
        """Return `values`."""
        ctx.save_for_backward(factor)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scale `gradient` by the factor."""
        (factor,) = ctx.saved_tensors
        return gradient * factor, None
