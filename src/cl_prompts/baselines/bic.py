"""Bias correction."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.baselines.batch import Batch
from cl_prompts.baselines.teacher import DistillingBaseline, distillation
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.features import record
from cl_prompts.learner.protocol import Images
from cl_prompts.runtime.precision import device_of_float64


class BiC(DistillingBaseline):
    """Replay and distillation, then two numbers that take the head's preference for new classes away.

    Wu et al., "Large Scale Incremental Learning", CVPR 2019. With n old and m new classes the loss is (1 - lambda) * cross
    entropy over all classes + lambda * distillation from the earlier, corrected model, lambda = n / (n + m) (equations 1
    to 3). Then the logits of the new classes become alpha * logit + beta (equation 4), fitted on images held out of
    training (equation 5); those of earlier classes stay. Here held-out images are chosen by their number, which is the same
    in all tasks. The fit is convex and solved to the end, with a little weight decay towards (1, 0): held-out images that
    are all classified rightly would call for an infinite alpha.

    Args:
        backbone: see `Baseline`.
        temperature: of the distillation, 2 in the paper.
        held_out: share of images that are not trained on, 0.1 as in the paper. They count in means with a loss of 0.
        options: see `Baseline`.

    Attributes:
        correction: (alpha, beta) of the newest classes [2].
    """

    name = "bic"
    replay = "mixed"
    needs_memory = True
    needs_consolidation = True

    def __init__(self, backbone: nn.Module, *, temperature: float = 2.0, held_out: float = 0.1, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.temperature, self.held_out = self.number("temperature", temperature), self.number("held_out", held_out)
        if temperature == 0 or not 0 < held_out < 1:
            raise ValueError(f"temperature={temperature} must be positive, held_out={held_out} between 0 and 1")
        self.correction = torch.tensor([1.0, 0.0])

    def before_task(self, classes: Sequence[int]) -> None:
        """Copy the corrected model, before a task of `classes`."""
        super().before_task(classes)
        self.correction = torch.tensor([1.0, 0.0], device=self.correction.device)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """The corrected classifier: [C, D] and [C]."""
        weight, bias = (values.detach().clone() for values in super().weight_and_bias())
        alpha, beta = self.correction.to(weight.device)
        weight[self.num_teacher_classes :] *= alpha
        bias[self.num_teacher_classes :] = alpha * bias[self.num_teacher_classes :] + beta
        return weight, bias

    def loss_parts(self, batch: Batch) -> dict[str, LossPart]:
        """Cross entropy and, from the second task on, distillation, of the images that are trained on."""
        trained = ~is_held_out(batch.numbers, self.held_out)
        old = self.num_teacher_classes / batch.logits.shape[1]
        parts = {"cross_entropy": LossPart((1 - old) * self.cross_entropy(batch).value, "mean")}
        if batch.teacher_logits is not None:
            parts["distillation"] = distillation(batch.teacher_logits, batch.logits, self.temperature, old)
        return {name: LossPart(torch.where(trained, part.value, 0.0), "mean") for name, part in parts.items()}

    def predict(self, features: Tensor, logits: Tensor) -> Tensor:
        """Corrected logits [B, C]."""
        return corrected(logits, self.num_teacher_classes, self.correction.to(logits.device))

    def consolidate(self, images: Images, memory: Images | None = None) -> None:
        """Fit the correction on the held-out images of `memory`, which are balanced over the classes.

        The task's `images` are not used.

        Raises:
            ValueError: no images are stored.
        """
        if memory is None:
            raise ValueError('"bic" needs remembered images: set memory_size or memory_per_class')
        old = self.num_teacher_classes
        if not 0 < old < len(self.classes):
            return
        seen = record(lambda batch: self.logits_of(self.features_of(batch)), memory)
        chosen = is_held_out(seen.ids, self.held_out)
        logits, (targets, _) = seen.features[chosen], self.head.to_targets(seen.labels[chosen])
        if not (targets < old).any() or not (targets >= old).any():
            warnings.warn(
                f"the {len(targets)} remembered images that are held out are not of both old and new classes, so nothing "
                "is corrected after this task: keep more images, or raise held_out",
                stacklevel=2,
            )
            return
        self.correction = fit_correction(logits, targets, old)

    def extra_tensors(self) -> dict[str, Tensor]:
        """Teacher and correction."""
        return super().extra_tensors() | {"correction": self.correction}

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore them."""
        super().load_extra_tensors(tensors)
        self.correction = tensors["correction"]


def is_held_out(numbers: Tensor, share: float) -> Tensor:
    """Which images [B] are held out: of any run of consecutive numbers, `share` of them (golden ratio sequence)."""
    return (numbers % 2**31) * 2654435761 % 2**32 < share * 2**32


def corrected(logits: Tensor, old: int, correction: Tensor) -> Tensor:
    """Logits [B, C] with alpha * logit + beta for the classes from index `old` on."""
    alpha, beta = correction
    return torch.cat([logits[:, :old], alpha * logits[:, old:] + beta], dim=1)


def fit_correction(logits: Tensor, targets: Tensor, old: int, decay: float = 1e-3) -> Tensor:
    """The (alpha, beta) [2] that make the cross entropy smallest.

    Args:
        logits: [n, C].
        targets: index of each image's class [n].
        old: number of old classes.
        decay: times the squared distance from (1, 0) joins the mean cross entropy.
    """
    home, work = logits.device, device_of_float64(logits.device)
    logits, targets = logits.to(work), targets.to(work)
    neutral = torch.tensor([1.0, 0.0], dtype=torch.float64, device=work)
    found = neutral.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=200, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(corrected(logits.double(), old, found), targets)
        loss = loss + decay * (found - neutral).square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return found.detach().float().to(home)
