"""Distillation from a frozen copy of the model as it was before a task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.baselines.base import Baseline
from cl_prompts.interfaces import LossPart
from cl_prompts.learner.nested_tensors import below, prefixed


class Teacher(nn.Module):
    """A frozen copy of backbone and head.

    Args:
        features: copied, unless frozen already.
        weight, bias: of the head, [C, D] and [C].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, features: FeatureExtractor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.features = None if features.frozen else copy.deepcopy(features).requires_grad_(False)
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("bias", bias.detach().clone())
        self.names = [f"features.{name}" for name, p in features.named_parameters() if p.requires_grad]
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Always in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, features: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, C] of images `pixel_values` [B, 3, H, W].

        With a frozen backbone they follow from the learner's own `features` [B, D]. `kwargs` are further inputs of it.
        """
        if self.features is not None:
            features = self.features(pixel_values, **kwargs)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """Copied tensors by name; without those of the backbone that are never trained."""
        return {"weight": self.weight, "bias": self.bias, **{name: self.get_parameter(name) for name in self.names}}


class DistillingBaseline(Baseline):
    """A baseline that keeps the model as it was before the task.

    Attributes:
        teacher: that model; None before the second task.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.teacher: Teacher | None = None

    @property
    def num_teacher_classes(self) -> int:
        """Number of classes that the teacher knows: those from before the newest task."""
        return 0 if self.teacher is None else len(self.teacher.weight)

    def before_task(self, classes: Sequence[int]) -> None:
        """Copy the model as it is, before a task of `classes`."""
        if self.classes:
            self.teacher = Teacher(self.features, *self.weight_and_bias())

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """The classifier of the next teacher: [C, D] and [C]."""
        assert self.head.bias is not None
        return self.head.weight, self.head.bias

    def teacher_logits(self, pixel_values: Tensor, features: Tensor, **kwargs: Any) -> Tensor | None:
        """The teacher's logits [B, earlier classes]; arguments as in `Baseline`."""
        return None if self.teacher is None else self.teacher(pixel_values, features.detach(), **kwargs)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The teacher."""
        return {} if self.teacher is None else prefixed("teacher.", self.teacher.tensors())

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore it."""
        found = below("teacher.", tensors)
        self.teacher = None
        if found:
            self.teacher = Teacher(self.features, found["weight"], found["bias"])
            for name, own in self.teacher.tensors().items():
                own.copy_(found[name])


def distillation(teacher_logits: Tensor, logits: Tensor, temperature: float, weight: float) -> LossPart:
    """Cross entropy of softened answers: -weight * sum of softmax(teacher / T) log softmax(logits / T).

    The sum is over the earlier classes.

    Args:
        teacher_logits: [B, earlier classes].
        logits: of all classes [B, C]; the earlier ones come first.
        temperature: T.
        weight: of this term in the loss.
    """
    own = (logits[:, : teacher_logits.shape[1]] / temperature).log_softmax(1)
    return LossPart(-weight * ((teacher_logits / temperature).softmax(1) * own).sum(1), "mean")
