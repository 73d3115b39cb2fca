"""Baselines that train from scratch in every task: joint training, an upper bound, and GDumb, which uses a memory alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline
from cl_prompts.heads.incremental import IncrementalHead


class RetrainFromScratch(Baseline):
    """Starts every task with the backbone it was given and a new head.

    Args:
        backbone: see `Baseline`; a copy of its trained parameters is kept on the CPU.
        options: see `Baseline`.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        super().__init__(backbone, **options)
        self._initial: dict[str, Tensor] = {
            name: p.detach().cpu().clone() for name, p in self.features.named_parameters() if p.requires_grad
        }

    def check_one_class(self) -> None:
        """Does nothing: later tasks are trained from scratch with all classes."""

    def before_task(self, classes: Sequence[int]) -> None:
        """Reset backbone and head, before a task of `classes`."""
        with torch.no_grad():
            for name, tensor in self._initial.items():
                self.features.get_parameter(name).copy_(tensor)
        self.head = IncrementalHead(self.features.width).to(self.head.weight.device)


class JointTraining(RetrainFromScratch):
    """Trained on the images of all tasks so far at once, which no continual learner may do: an upper bound.

    Its stream is a `cl_prompts.continual.JointStream`.
    """

    name = "joint"

    def before_task(self, classes: Sequence[int]) -> None:
        """Reset backbone and head, if the `classes` of the next task are all classes so far.

        Raises:
            ValueError: it has not.
        """
        missing = sorted(set(self.classes) - set(classes))
        if missing:
            raise ValueError(f"classes {missing} do not come back in this task: train jointly on JointStream(stream)")
        super().before_task(classes)


class GDumb(RetrainFromScratch):
    """Trained on the memory alone, from scratch after each task ("greedy sampler and dumb learner").

    Prabhu, Torr & Dokania, "GDumb: A Simple Approach that Questions Our Progress in Continual Learning", ECCV 2020. Their
    learner starts from random weights and trains for 256 epochs with CutMix; here it starts from the given backbone and
    trains as all baselines do.
    """

    name = "gdumb"
    replay = "memory_only"
    needs_memory = True
