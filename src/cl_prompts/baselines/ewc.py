"""Elastic weight consolidation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.penalty import QuadraticPenalty, grown_like
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.distributed import sum_over_processes


class EWC(Baseline):
    """Parameters that earlier tasks' answers depend on are held near their values after those tasks.

    Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, equation 3: the loss takes
    strength / 2 * sum of F_t (theta - theta_t)^2 for every earlier task t. The sum over tasks is kept as one quadratic
    around the weighted mean of the theta_t, which differs from it by a constant.

    F_t is the diagonal of the empirical Fisher information: the mean over the task's training images of the squared
    gradient of log p(own label), one image at a time, un-augmented, in eval mode, p over the classes that `class_mask`
    leaves.

    Args:
        backbone: see `Baseline`.
        strength: lambda. Ours; the paper chooses it by task.
        options: see `Baseline`.
    """

    name = "ewc"
    needs_consolidation = True

    def __init__(self, backbone: nn.Module, *, strength: float = 1000.0, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.penalty = QuadraticPenalty(self.number("strength", strength) / 2)

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy and, from the second task on, the penalty."""
        parts = super().loss_parts(batch)
        if self.penalty.importance:
            parts["penalty"] = LossPart(self.penalty.value(self.trained()), "batch")
        return parts

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Add the Fisher information of the task's `images` to the penalty; `memory` is not used."""
        fisher = fisher_information(self, images)
        for name, parameter in self.trained().items():
            self._add(name, parameter.detach(), fisher[name])

    def _add(self, name: str, theta: Tensor, fisher: Tensor) -> None:
        penalty = self.penalty
        total = grown_like(penalty.importance.get(name), theta) + fisher
        center = grown_like(penalty.center.get(name), theta)
        # The mean of all theta_t, weighted by F_t; without any weight the place does not matter.
        penalty.center[name] = center + torch.where(total > 0, fisher / total, 1.0) * (theta - center)
        penalty.importance[name] = total

    def extra_tensors(self) -> dict[str, Tensor]:
        """The penalty."""
        return self.penalty.state_dict()

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore it."""
        self.penalty.load_state_dict(tensors)


class OnlineEWC(EWC):
    """EWC with one penalty around the newest parameters and Fisher information that fades.

    Schwarz et al., "Progress & Compress: A scalable framework for continual learning", ICML 2018: after a task
    F <- decay * F + F_t, and the loss takes strength / 2 * sum of F (theta - theta_newest)^2. (They also normalize each
    F_t; we do not.)

    Args:
        backbone: see `Baseline`.
        decay: gamma, what is left of the Fisher information after one more task, 0 to 1. Ours; the paper searches it.
        options: see `EWC`, whose `strength` is lambda here too.
    """

    name = "ewc_online"

    def __init__(self, backbone: nn.Module, *, decay: float = 0.9, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.decay = self.number("decay", decay)
        if decay > 1:
            raise ValueError(f"decay={decay} must be between 0 and 1: more would let the Fisher information grow for ever")

    def _add(self, name: str, theta: Tensor, fisher: Tensor) -> None:
        penalty = self.penalty
        penalty.importance[name] = self.decay * grown_like(penalty.importance.get(name), theta) + fisher
        penalty.center[name] = theta.clone()


def fisher_information(learner: Baseline, images: Images) -> dict[str, Tensor]:
    """Mean squared gradient of log p(label) of each trained parameter, over the images of all processes.

    Args:
        learner: in eval mode.
        images: this process's share.
    """
    parameters = learner.trained()
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = torch.zeros((), device=learner.head.weight.device)
    for batch in images:
        targets, _ = learner.head.to_targets(batch["labels"])
        for i in torch.nonzero(targets >= 0).flatten().tolist():
            image = {
                name: value[i : i + 1] if isinstance(value, torch.Tensor) and value.dim() else value
                for name, value in batch.items()
            }
            with torch.enable_grad():
                logits = learner.masked(learner.logits_of(learner.features_of(image)))
                gradients = torch.autograd.grad(logits.log_softmax(1)[0, targets[i]], list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                sums[name] += gradient.square()
            count += 1
    whole = sum_over_processes(count).clamp_min(1)
    return {name: sum_over_processes(total) / whole for name, total in sums.items()}
