"""Learners that start afresh with every task: joint training, an upper bound, and GDumb, which trains on a memory alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import ComparisonLearner
from cl_prompts.heads.incremental import GrowingHead


class FreshStart(ComparisonLearner):
    """Forgets at the beginning of a task all it has learnt: the backbone is the given one again, the head new.

    Args:
        backbone: see `ComparisonLearner`; a copy of what is trained of it is kept in main memory.
        options: see `ComparisonLearner`.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self._given: dict[str, Tensor] = {
            name: p.detach().cpu().clone() for name, p in self.features.named_parameters() if p.requires_grad
        }

    def before_task(self, declared: list[int]) -> None:
        """Back to the start."""
        with torch.no_grad():
            for name, tensor in self._given.items():
                self.features.get_parameter(name).copy_(tensor)
        self.head = GrowingHead(self.features.width).to(self.head.weight.device)


class JointTraining(FreshStart):
    """Trained on the images of all tasks so far at once, which no continual learner may do: an upper bound.

    Its stream is a `JointStream`.
    """

    name = "joint"

    def before_task(self, declared: list[int]) -> None:
        """Back to the start, if the task is all there was so far.

        Raises:
            ValueError: it is not: classes of earlier tasks do not come back.
        """
        missing = sorted(set(self.classes) - set(declared))
        if missing:
            raise ValueError(f"classes {missing} do not come back in this task: train jointly on JointStream(stream)")
        super().before_task(declared)


class GDumb(FreshStart):
    """Trained on the memory alone, after each task anew ("greedy sampler and dumb learner").

    Prabhu, Torr & Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020. Their
    learner starts from random weights and trains for 256 epochs with CutMix; here it starts from the given backbone and is
    trained as all learners are.
    """

    name = "gdumb"
    rehearses = "only"
    needs_memory = True
