"""Steps of an optimizer projected onto what earlier tasks do not use: the null space of their features.

VPT-NSP2 (Lu et al., NeurIPS 2024) and CPG (Lu et al., AAAI 2025). At the end of a task each layer's matrix C grows by the
mean of r'r over the rows r of each batch of the task's images. Singular vectors of C behind the knee of its singular values
span the null space; with their projector P, later steps are multiplied by

    B = eta P / |P| + (1 - eta) I          |P|: Frobenius norm, so that the step is also shortened
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import AttentionSeen, BackboneShape
from cl_prompts.methods.pool import PromptPool, TaskStatistics
from cl_prompts.runtime.distributed import sum_over_processes


SMOOTHED_FROM = 128  # singular values
SIGMA, RADIUS = 10.0, 40  # of the Gaussian that smooths them
CUT = 0.015  # share of the second differences that is left out at both ends


def null_space_size(values: Tensor) -> int:
    """How many of the smallest singular `values` [n], n >= 3, descending, lie behind the knee."""
    n = len(values)
    if n < SMOOTHED_FROM:
        knee = int(values.diff(n=2).argmax()) + 1
    else:
        kernel = (-0.5 * (torch.arange(-RADIUS, RADIUS + 1, dtype=values.dtype) / SIGMA) ** 2).exp()
        padded = torch.cat([values[:RADIUS].flip(0), values, values[-RADIUS:].flip(0)])
        smooth = F.conv1d(padded[None, None], (kernel / kernel.sum())[None, None])[0, 0]
        bends, cut = smooth.diff(n=2), int(CUT * n)
        bends = bends[cut : len(bends) - cut]
        knee = int(bends.argmax()) + int((n - len(bends)) / 2)
    return n - int((values >= values[knee]).nonzero()[-1])


def projection(matrix: Tensor, eta: float) -> Tensor:
    """B of a matrix, computed in float64 on the CPU.

    Args:
        matrix: C, symmetric [n, n].
        eta: weight of the null space; the identity has the rest.

    Returns:
        [n, n]; the identity for n < 3, where there is no knee.
    """
    c = matrix.detach().to("cpu", torch.float64)
    identity = torch.eye(len(c), dtype=c.dtype)
    if len(c) < 3:
        return identity.to(matrix)
    values, vectors = torch.linalg.eigh(c)
    order = values.abs().argsort(descending=True, stable=True)
    kept = vectors[:, order[-null_space_size(values.abs()[order]) :]]
    projector = kept @ kept.T
    return (eta * projector / projector.norm() + (1 - eta) * identity).to(matrix)


class Moments(TaskStatistics):
    """The matrices of one pass over a task's images.

    Args:
        pool: the pool that they are for.
    """

    def __init__(self, pool: ProjectedPool) -> None:
        self.pool = pool
        self.first, self.second = torch.zeros_like(pool.first), torch.zeros_like(pool.second)

    def add(self, seen: AttentionSeen, *, valid: Tensor) -> None:
        """See `TaskStatistics`. Each batch counts as much as the others, as in the released code."""
        row = self.pool.layers.index(seen.layer)
        with torch.autocast(valid.device.type, enabled=False):
            first, second, rows = self.pool.moments(seen, valid)
        sums = sum_over_processes(torch.cat([first.flatten(), second.flatten(), rows.float()[None]]))
        means = sums[:-1] / sums[-1].clamp_min(1)
        self.first[row] += means[: first.numel()].view_as(first)
        self.second[row] += means[first.numel() :].view_as(second)


class ProjectedPool(PromptPool):
    """Base of methods whose steps are projected. A subclass has prefixes in each of `layers`.

    Tensors: the matrices `first` [layers, D, D] and `second` [layers, n, n] of the tasks so far, saved with
    `save_statistics`; `collected`, the number of tasks whose images were seen, and `available`, of those in the matrices.

    Args:
        config: the method's config.
        shape: sizes of the backbone.
        layers: prompted blocks.
        size: n of `second`.

    Raises:
        ValueError: attention of the backbone runs in windows.
    """

    collects: ClassVar[bool] = True
    first: Tensor
    second: Tensor
    collected: Tensor
    available: Tensor

    def __init__(self, config: Any, shape: BackboneShape, layers: Sequence[int], size: int) -> None:
        super().__init__(config, shape)
        if shape.windowed:
            raise ValueError(f'method "{config.method}" needs the attention of whole images; this base attends in windows')
        self._layers, save = tuple(layers), config.save_statistics
        self.register_buffer("first", torch.zeros(len(layers), shape.width, shape.width), persistent=save)
        self.register_buffer("second", torch.zeros(len(layers), size, size), persistent=save)
        self.register_buffer("collected", torch.zeros((), dtype=torch.int64))
        self.register_buffer("available", torch.zeros((), dtype=torch.int64), persistent=save)

    @property
    def needs_query(self) -> bool:
        """False: one pass is enough."""
        return False

    @property
    def layers(self) -> Sequence[int]:
        """The prompted blocks."""
        return self._layers

    @abstractmethod
    def moments(self, seen: AttentionSeen, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of r'r over the rows of a batch for `first` [D, D] and `second` [n, n], and the number of rows, a scalar.

        Args:
            seen: the attention of one block.
            valid: True for real images, False for padding [B].
        """

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Warn if the images of the task before were not seen."""
        if not self.rebuilding and self.num_tasks and int(self.collected) < self.num_tasks:
            warnings.warn(
                f"{self.config.method} has seen the images of {int(self.collected)} of {self.num_tasks} tasks, and nothing "
                "keeps the next task from changing what the others need: call model.consolidate(images) before end_task()",
                stacklevel=5,
            )
        super().begin_task(class_indices)

    def check_statistics(self) -> None:
        """Check that further tasks can be learned.

        Raises:
            ValueError: the matrices of earlier tasks were not saved.
        """
        if self.collected.device.type != "meta" and int(self.collected) != int(self.available):
            raise ValueError(
                "this adapter was saved without the matrices of its tasks, so it can answer but not learn further tasks: "
                "save with save_statistics=True in its config"
            )

    def new_statistics(self) -> TaskStatistics:
        """Empty matrices.

        Raises:
            ValueError: those of all tasks are known.
        """
        if int(self.collected) >= self.num_tasks:
            raise ValueError(
                f"the images of all {self.num_tasks} tasks begun were seen already: call begin_task for the next one first"
            )
        return Moments(self)

    def keep_statistics(self, statistics: TaskStatistics) -> None:
        """Add the matrices of the newest task, `statistics` of `new_statistics`."""
        assert isinstance(statistics, Moments)
        self.first, self.second = self.first + statistics.first, self.second + statistics.second
        self.collected, self.available = self.collected + 1, self.available + 1

    def projections(self) -> tuple[Tensor, Tensor] | None:
        """B of `first` and of `second` for each layer [layers, n, n]; None before a task's images were seen."""
        if not int(self.collected):
            return None
        first = torch.stack([projection(c, self.config.eta1) for c in self.first])
        return first, torch.stack([projection(c, self.config.eta2) for c in self.second])
