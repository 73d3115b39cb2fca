"""GEM: gradient episodic memory."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.batch import Batch
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.distributed import sum_over_processes


RIDGE = 1e-6  # share of the mean squared length of the references, so that the quadratic programme has one solution


class EpisodicMemory(Baseline):
    """A baseline whose steps are constrained by gradients of remembered images.

    Attributes:
        stored_numbers: `sample_ids` of the remembered images, ascending [n].
        stored_tasks: number of the task that each came from [n].
    """

    replay = "mixed"
    needs_memory = True
    needs_consolidation = True

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.stored_numbers = torch.zeros(0, dtype=torch.int64)
        self.stored_tasks = torch.zeros(0, dtype=torch.int64)
        # Since the last step: gradients of the remembered images' losses, summed by constraint [K, parameters], and number
        # of new images and of those of each constraint [1 + K].
        self._sums, self._counts = torch.zeros(0, 0), torch.zeros(0)

    def constraint_of(self, task: Tensor) -> Tensor:
        """The constraints [B] that remembered images count for, by the numbers of their `task` [B]."""
        return task

    @abstractmethod
    def project(self, gradient: Tensor, references: Tensor) -> Tensor:
        """The gradient of the step [P].

        Args:
            gradient: of the new images [P].
            references: of the remembered images of each constraint [K, P], K > 0.
        """

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy of the new images; the gradients of the remembered ones are noted for the step."""
        each = self.cross_entropy(batch).value
        if not len(self.stored_numbers):
            return {"cross_entropy": LossPart(each, "mean")}
        rows = torch.searchsorted(self.stored_numbers, batch.numbers).clamp_max(len(self.stored_numbers) - 1)
        remembered = self.stored_numbers[rows] == batch.numbers
        of = torch.where(remembered, 1 + self.constraint_of(self.stored_tasks[rows]), 0)
        self._note(each, torch.where(batch.valid, of, -1))
        return {"cross_entropy": LossPart(torch.where(remembered, 0.0, each), "mean")}

    def _note(self, losses: Tensor, of: Tensor) -> None:
        """Add gradients and numbers of images; `of` [B]: 0 for new images, 1 + constraint for others, -1 for padding."""
        parameters = list(self.trained().values())
        number = 1 + int(self.constraint_of(self.stored_tasks).max())
        if not len(self._counts):
            self._sums = losses.new_zeros(number, sum(p.numel() for p in parameters))
            self._counts = losses.new_zeros(1 + number)
        self._counts += torch.bincount(of[of >= 0], minlength=1 + number)
        for constraint in range(number):
            own = of == 1 + constraint
            if own.any():
                gradients = torch.autograd.grad(losses[own].sum(), parameters, retain_graph=True)
                self._sums[constraint] += torch.cat([g.flatten() for g in gradients])

    def before_step(self) -> None:
        """Replace the gradient by the projected one."""
        if not len(self._counts):
            return
        sums, counts = sum_over_processes(self._sums), sum_over_processes(self._counts)
        self._sums, self._counts = torch.zeros(0, 0), torch.zeros(0)
        seen = counts[1:] > 0
        if not seen.any():
            return
        # The loss of the new images is divided by the number of all images of the batch; so are these.
        references = sums[seen] / counts[1:][seen, None] * (counts[0] / counts.sum())
        gradients = [p.grad for p in self.trained().values() if p.grad is not None]
        projected = self.project(torch.cat([g.flatten() for g in gradients]), references)
        for gradient, part in zip(gradients, projected.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Note which task each image in `memory` came from. The task's `images` are not used.

        Raises:
            ValueError: no images are stored.
        """
        if memory is None:
            raise ValueError(f'"{self.name}" needs remembered images: set memory_size or memory_per_class')
        numbers = record(lambda batch: torch.zeros(len(batch["labels"]), 0, device=batch["labels"].device), memory).ids
        tasks = torch.full_like(numbers, self.num_tasks - 1)
        known = torch.isin(numbers, self.stored_numbers)
        tasks[known] = self.stored_tasks[torch.searchsorted(self.stored_numbers, numbers[known])]
        self.stored_numbers, self.stored_tasks = numbers, tasks

    def extra_tensors(self) -> dict[str, Tensor]:
        """Numbers and tasks of the remembered images."""
        return {"numbers": self.stored_numbers, "tasks": self.stored_tasks}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        self.stored_numbers, self.stored_tasks = tensors["numbers"], tensors["tasks"]


class GEM(EpisodicMemory):
    """No step may raise the loss of the remembered images of any earlier task.

    Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017. Let g be the gradient of the new
    images' loss and G the gradients g_k of the remembered images' loss, a row for each earlier task k. If <g, g_k> < 0 for
    some k (equation 8), the step uses g' = G^T v + g, the nearest gradient with <g', g_k> >= 0 for all k, with v from

        min over v of v^T G G^T v / 2 + (G g)^T v,  v >= margin   (equation 11; the margin is that of its experiments)

    Where it differs: g_k is of those remembered images that joined the batch, not of all; there is one head, and the loss
    compares all classes. A step takes a backward pass and a copy of the gradient for each earlier task. With clipping, g is
    the clipped gradient.

    Args:
        backbone: see `Baseline`.
        margin: gamma, 0.5 in the paper's experiments.
        options: see `Baseline`.
    """

    name = "gem"

    def __init__(self, backbone: nn.Module, *, margin: float = 0.5, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.margin = self.number("margin", margin)

    def project(self, gradient: Tensor, references: Tensor) -> Tensor:
        """The gradient of the step; see `EpisodicMemory`, with its `gradient` and `references`."""
        gram, slopes = (references @ references.T).cpu().double(), (references @ gradient).cpu().double()
        if (slopes >= 0).all():
            return gradient
        gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        margin = torch.full_like(slopes, self.margin)
        weights = margin + nonnegative_minimum(gram, slopes + gram @ margin)
        return gradient + weights.to(gradient) @ references


def nonnegative_minimum(matrix: Tensor, vector: Tensor) -> Tensor:
    """The v >= 0 [K] with the smallest v^T matrix v / 2 + vector^T v, exact, by active sets (Lawson & Hanson, 1974).

    Args:
        matrix: positive definite [K, K], float64.
        vector: [K], float64.
    """
    found, free = torch.zeros_like(vector), torch.zeros_like(vector, dtype=torch.bool)
    tolerance = 1e-12 * vector.abs().max()
    for _ in range(10 * len(vector)):  # a bound for the case that rounding makes it go round in circles
        descent = (-(matrix @ found) - vector).masked_fill(free, float("-inf"))
        if (descent <= tolerance).all():
            break
        free[descent.argmax()] = True
        while True:
            wanted = torch.zeros_like(found)
            wanted[free] = torch.linalg.solve(matrix[free][:, free], -vector[free])
            below = free & (wanted <= 0)
            if not below.any():
                found = wanted
                break
            # Go as far as all stay positive; the first that would not is bound again.
            ways = torch.where(below, found / (found - wanted).clamp_min(1e-300), float("inf"))
            first = ways.argmin()
            found = found + ways[first] * (wanted - found)
            found[first], free[first] = 0.0, False
    return found
