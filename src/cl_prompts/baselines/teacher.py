"""The model as it was before a task, which teaches the new one what it answered."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.backbones.feature_extractor import FeatureExtractor
from cl_prompts.baselines.base import ComparisonLearner
from cl_prompts.continual.checkpointing.checkpoint import below, prefixed
from cl_prompts.interfaces import LossPart


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
        """Logits [B, C] of images; `features` are the learner's own [B, D], which a frozen backbone shares."""
        if self.features is not None:
            features = self.features(pixel_values, **kwargs)
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight, self.bias)

    def tensors(self) -> dict[str, Tensor]:
        """What was copied, by name; not what no learner trains."""
        return {"weight": self.weight, "bias": self.bias, **{name: self.get_parameter(name) for name in self.names}}


class DistillingLearner(ComparisonLearner):
    """Keeps the model as it was before the task.

    Attributes:
        teacher: that model; None before the second task.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.teacher: Teacher | None = None

    @property
    def taught_columns(self) -> int:
        """How many columns the teacher knows: the classes from before the newest task."""
        return 0 if self.teacher is None else len(self.teacher.weight)

    def before_task(self, declared: list[int]) -> None:
        """Keep the model as it is."""
        if self.classes:
            self.teacher = Teacher(self.features, *self.weight_and_bias())

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """The classifier that the teacher is to have."""
        assert self.head.bias is not None
        return self.head.weight, self.head.bias

    def teach(self, pixel_values: Tensor, features: Tensor, **kwargs: Any) -> Tensor | None:
        """The teacher's logits [B, earlier classes]."""
        return None if self.teacher is None else self.teacher(pixel_values, features.detach(), **kwargs)

    def extra_tensors(self) -> dict[str, Tensor]:
        """The teacher."""
        return {} if self.teacher is None else prefixed("teacher.", self.teacher.tensors())

    def load_extra_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take it back."""
        found = below("teacher.", tensors)
        self.teacher = None
        if found:
            self.teacher = Teacher(self.features, found["weight"], found["bias"])
            for name, own in self.teacher.tensors().items():
                own.copy_(found[name])


def distillation(taught: Tensor, logits: Tensor, temperature: float, weight: float) -> LossPart:
    """Cross entropy of softened answers: -weight * sum of softmax(taught / T) log softmax(logits / T), over taught classes.

    Args:
        taught: [B, earlier classes].
        logits: of all classes [B, C]; the earlier ones come first.
        temperature: T.
        weight: of this term in the loss.
    """
    own = (logits[:, : taught.shape[1]] / temperature).log_softmax(1)
    return LossPart(-weight * ((taught / temperature).softmax(1) * own).sum(1), "mean")
