"""Baselines that keep a part of the network for each task."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.baselines.base import Baseline


class TaskNetworks(Baseline):
    """A baseline in which every task has a network of its own inside the backbone.

    At test each class has the logit that the network of its task gives, so an answer takes a pass for each task. The
    networks were never compared, so these learners need the task of an image (`needs_task`): their task-incremental
    accuracy, over the logits of the image's task, is what their papers report. A class that came in several tasks is
    answered by the newest of their networks.

    Args:
        backbone: see `Baseline`.
        freeze_backbone: whether the weights are fixed; the learner says which it must be.
        options: see `Baseline`.
    """

    needs_task = True
    fixed_weights = False

    def __init__(self, backbone: nn.Module, *, freeze_backbone: bool | None = None, **options: Any) -> None:
        freeze_backbone = self.fixed_weights if freeze_backbone is None else freeze_backbone
        if freeze_backbone != self.fixed_weights:
            raise ValueError(f"freeze_backbone={freeze_backbone!r}: {self.name!r} needs {self.fixed_weights}, leave it out")
        super().__init__(backbone, freeze_backbone=freeze_backbone, **options)

    @abstractmethod
    def network(self, task: int) -> AbstractContextManager[None]:
        """Within this context, and in this thread only, the backbone computes what the network of `task` does."""

    def network_logits(self, pixel_values: Tensor, task: int, **kwargs: Any) -> Tensor:
        """The head's logits [B, C] of images [B, 3, H, W] by the network of `task`; `kwargs` go to the backbone."""
        with self.network(task):
            return self.logits_of(self.features(pixel_values, **kwargs))

    @property
    def needs_query(self) -> bool:
        """False: features of the whole backbone are not used."""
        return False

    def compute_features(self, pixel_values: Tensor, query: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Features [B, D] of `pixel_values` by the newest task's network; arguments as in `Baseline`.

        Raises:
            ValueError: `query` is given, or gradient checkpointing is on in training.
        """
        if query is not None:
            raise ValueError("query holds features of the whole backbone, which this learner does not use: leave it out")
        self.refuse_checkpointing()
        with self.network(self.num_tasks - 1):
            return self.features(pixel_values, **kwargs)

    def answer(self, pixel_values: Tensor, features: Tensor, logits: Tensor, **kwargs: Any) -> Tensor:
        """Logits at test [B, C], each of its task's network; arguments as in `Baseline`."""
        found = torch.empty_like(logits)
        for task, columns in enumerate(self.tasks.class_indices(self.tasks.state.tasks)):
            newest = task == self.num_tasks - 1
            found[:, columns] = (logits if newest else self.network_logits(pixel_values, task, **kwargs))[:, columns]
        return found

    def current_rows(self) -> dict[str, Tensor]:
        """Update factors that freeze the head's rows of classes that are not in the current task."""
        current = self.head.current.float()
        return {"head.weight": current[:, None], "head.bias": current}
