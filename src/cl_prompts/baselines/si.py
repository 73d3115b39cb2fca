"""Synaptic intelligence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.penalty import QuadraticPenalty, grown_like
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.nested_tensors import below, prefixed


class SI(Baseline):
    """Parameters are held by how much their change in earlier tasks lowered the loss.

    Zenke, Poole & Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017. While a task is trained, every
    optimizer step adds -gradient * step to a parameter's path integral omega (equation 3; the gradient is that of the
    task's loss without the penalty, unless it was clipped). After the task, omega / ((distance from its start)^2 + xi)
    joins the importance (equation 5), which stays non-negative as in the published code. The loss takes
    strength * sum of importance * (theta - theta after the newest task)^2 (equation 4).

    Args:
        backbone: see `Baseline`.
        strength: c; 0.1 as for split CIFAR in the paper.
        damping: xi, as in the paper.
        options: see `Baseline`.
    """

    name = "si"

    def __init__(self, backbone: nn.Module, *, strength: float = 0.1, damping: float = 1e-3, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.penalty = QuadraticPenalty(self.number("strength", strength))
        self.damping = self.number("damping", damping)
        if damping == 0:
            raise ValueError(
                "damping=0 would divide by zero where a parameter did not move: choose a small positive number"
            )
        self.path: dict[str, Tensor] = {}  # omega of the current task
        self.start: dict[str, Tensor] = {}  # parameters at its start
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # parameter and gradient before a step

    def begin_task(self, *args: Any, **kwargs: Any) -> None:
        """Open the next task; `args` and `kwargs` as in `Baseline`. The path integrals start at zero."""
        super().begin_task(*args, **kwargs)
        self.start = {name: p.detach().clone() for name, p in self.trained().items()}
        self.path = {name: torch.zeros_like(p) for name, p in self.start.items()}

    def before_step(self) -> None:
        """Note parameters and gradients."""
        for name, p in self.trained().items():
            if p.grad is not None:
                self._before[name] = p.detach().clone(), p.grad - self.penalty.gradient(name, p)

    def after_step(self) -> None:
        """Add -gradient * step to the path integrals."""
        parameters = self.trained()
        for name, (place, gradient) in self._before.items():
            self.path[name] -= gradient * (parameters[name] - place)
        self._before.clear()

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy and, from the second task on, the penalty."""
        parts = super().loss_parts(batch)
        if self.penalty.importance:
            parts["penalty"] = LossPart(self.penalty.value(self.trained()), "batch")
        return parts

    def end_task(self) -> None:
        """Close the task; its importance joins that of earlier tasks."""
        super().end_task()
        penalty = self.penalty
        for name, parameter in self.trained().items():
            theta = parameter.detach()
            gained = self.path[name] / ((theta - self.start[name]).square() + self.damping)
            penalty.importance[name] = (grown_like(penalty.importance.get(name), theta) + gained).clamp_min(0)
            penalty.center[name] = theta.clone()
        self.path, self.start = {}, {}

    def extra_tensors(self) -> dict[str, Tensor]:
        """Penalty, path integrals, and parameters at the start of the task."""
        return self.penalty.state_dict() | prefixed("path.", self.path) | prefixed("start.", self.start)

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        self.penalty.load_state_dict(tensors)
        self.path, self.start = below("path.", tensors), below("start.", tensors)
