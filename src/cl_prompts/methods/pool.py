"""The contract of a prompt pool: what a method implements, and what it is given to learn from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.interfaces import AttentionSeen, BackboneShape, LossPart, PoolInput, Prompts
from cl_prompts.methods.shared.per_task import TaskTensors
from cl_prompts.methods.shared.regularizers import alignment, collapse, diversity


@dataclass
class Observation:
    """A training step as a pool's statistics see it. All tensors are without gradient.

    Args:
        ids: prompts that the step used, as in `Prompts.ids`; [B, layers, k] for prefixes selected inside the attention.
        query: un-prompted features [B, D], or None.
        targets: index of the logit of each image's class [B], -100 for padding; None without labels.
        valid: True for real images, False for padding [B].
        first_seen: True for real images that the current task has not shown before, in a pool that `counts_images` [B].
        scores: selection scores, as in `Prompts.scores` or [B, layers, ..., M].
        features: input of the classifier [B, D].
    """

    ids: Tensor | None
    query: Tensor | None
    targets: Tensor | None
    valid: Tensor
    first_seen: Tensor
    scores: Tensor | None = None
    features: Tensor | None = None


class TaskStatistics(ABC):
    """What a pool collects in the pass over a task's images at its end. Every process has as many batches as the others."""

    @abstractmethod
    def add(self, seen: AttentionSeen, *, valid: Tensor) -> None:
        """Add one block's attention `seen` for a batch, over all processes; `valid` [B] is False for padding."""


class PromptPool(nn.Module, ABC):
    """Base class of all methods; `register_prompt_method` gives a subclass its name.

    Trained values are one stacked Parameter per kind of tensor. Frozen values are buffers: a zero gradient does not freeze
    a row under momentum or weight decay.

    Args:
        config: the method's config.
        shape: sizes of the backbone.
    """

    # Parameter name -> group of `parameter_groups`: "prompts", "keys" or "routers".
    roles: ClassVar[dict[str, str]] = {}
    # Parameters of the group "prompts" whose rows are not prompt tokens.
    no_rows: ClassVar[tuple[str, ...]] = ()
    # Buffers that hold prompts, besides those of earlier tasks beside a `PerTask` parameter.
    prompt_buffers: ClassVar[tuple[str, ...]] = ()
    # Whether the task's images are read once more at its end (`new_statistics`).
    collects: ClassVar[bool] = False

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.num_tasks = 0
        self.rebuilding = False  # True while tasks are replayed for their shapes; the values then come from a file

    # ---- what a method says of itself ----------------------------------------------------------------------------------

    @property
    def needs_query(self) -> bool:
        """Whether `forward` or `observe` reads the un-prompted feature."""
        return True

    @property
    def layers(self) -> Sequence[int]:
        """Blocks that may get key/value prefixes."""
        return ()

    @property
    def heads(self) -> int | None:
        """Number of heads that prefix rows are split into; None keeps them in the input space (`prefix_space`)."""
        return self.shape.num_heads if self.config.prefix_space == "projected" else None

    @property
    def prompt_names(self) -> set[str]:
        """Names of the tensors that hold prompts, those of earlier tasks included."""
        trained = {name for name, role in self.roles.items() if role == "prompts" and name not in self.no_rows}
        earlier = {name.removesuffix("current") + "earlier" for name in trained if name.endswith(".current")}
        return trained | earlier | set(self.prompt_buffers)

    # ---- forward -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, batch: PoolInput) -> Prompts:
        """Select and build the prompts of a `batch`."""

    def feature_losses(self, features: Tensor, targets: Tensor, valid: Tensor) -> dict[str, LossPart]:
        """Terms of the training loss on the input of the classifier.

        Args:
            features: [B, D], with gradient.
            targets: index of the logit of each image's class [B]; -100 for padding.
            valid: True for real images [B].
        """
        return {}

    def regularizers(self, scores: Tensor | None, valid: Tensor) -> dict[str, LossPart]:
        """The terms of the config's `diversity_weight`, `alignment_weight` and `entropy_weight`.

        Args:
            scores: as in `Observation`, [B, M] or [B, layers, M], with gradient.
            valid: True for real images [B].
        """
        config, parts = self.config, {}
        if config.diversity_weight:
            parts["diversity"] = config.diversity_weight * diversity(self.prompt_table().flatten(2))
        if config.alignment_weight and (keys := self.key_table()) is not None:
            parts["alignment"] = config.alignment_weight * alignment(self.prompt_table(), keys)
        if config.entropy_weight and scores is not None:
            parts["collapse"] = config.entropy_weight * collapse(scores, valid)
        return {name: LossPart(value, "batch") for name, value in parts.items()}

    @abstractmethod
    def prompt_table(self) -> Tensor:
        """All prompts in use, by group (layer, or head of a layer): [groups, M, rows, D], with gradient."""

    def key_table(self) -> Tensor | None:
        """Their keys [groups or 1, M, D]; None for a method without keys."""
        return None

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """Task whose prompts have the largest weight, for each image of a test pass.

        Args:
            ids: `prompt_ids` of `PromptPoolOutput`, [B, k] or [B, layers, k].
            weights: its `prompt_weights`, [B, k] or [B, layers, k].
            query: its `query` [B, D].

        Returns:
            Task numbers [B], or [B, layers] if each layer selects. None if prompts belong to no single task.
        """
        return None

    # ---- training ------------------------------------------------------------------------------------------------------

    @property
    def counts_images(self) -> bool:
        """Whether `observe` reads `first_seen`. If not, all images are new, and processes exchange no numbers of images."""
        return type(self).observe is not PromptPool.observe

    def observe(self, seen: Observation) -> None:
        """Update statistics with a training step, `seen`. Parts that are `GatheredStatistics` are summed once a task."""

    def update_factors(self) -> dict[str, Tensor]:
        """Factors in [0, 1], by parameter name, that scale an optimizer's steps; they broadcast to the parameter."""
        return {}

    def update_projections(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Linear maps, by parameter name, that an optimizer's steps [size of the parameter] go through."""
        return {}

    @torch.no_grad()
    def fill_prompts(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Set every row of the trainable prompts to one of `vectors` [n, D] (patch embeddings), drawn by `generator`."""
        for name, role in self.roles.items():
            if role != "prompts" or name in self.no_rows:
                continue
            owner, _, last = name.rpartition(".")
            tensor = getattr(self.get_submodule(owner), last)
            if isinstance(tensor, nn.Parameter):
                rows = torch.randint(vectors.shape[0], (tensor.numel() // vectors.shape[1],), generator=generator)
                tensor.copy_(vectors[rows.to(vectors.device)].view_as(tensor))

    # ---- tasks ---------------------------------------------------------------------------------------------------------

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add what the next task needs; also replayed to rebuild shapes before values are loaded.

        Args:
            class_indices: logit indices of the task's classes.
        """
        self.num_tasks += 1

    def end_task(self) -> None:
        """Close the current task."""

    def group_classes(self, groups: ClassGroups) -> None:
        """Forget and merge classes, as `groups` says, between tasks. Prompts stay.

        A pool that keeps tensors per class outside of `TaskTensors` modules extends this method.
        """
        for part in self.modules():
            if isinstance(part, TaskTensors):
                part.group_classes(groups)

    def check_statistics(self) -> None:
        """Raise ValueError if the pool was saved without what the next task needs."""

    def new_statistics(self) -> TaskStatistics:
        """Empty statistics for the pass over the images of the current task; only of a pool that `collects`."""
        raise NotImplementedError(f"{type(self).__name__} has collects=True, so it must define new_statistics")

    def keep_statistics(self, statistics: TaskStatistics) -> None:
        """Take over the `statistics` of the current task; only of a pool that `collects`."""
        raise NotImplementedError(f"{type(self).__name__} has collects=True, so it must define keep_statistics")

    def rebuild(self, tasks: Sequence[Sequence[int]]) -> None:
        """Replay `begin_task` for `tasks` (class indices of each), in linear time; the values come from a file."""
        self.rebuilding = True
        for class_indices in tasks[:2]:
            self.begin_task(class_indices)
        if len(tasks) > 3:
            self.make_room(tasks[2:-1])
        for class_indices in tasks[2:][-1:]:
            self.begin_task(class_indices)
        self.rebuilding = False

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """Allocate the tensors of `tasks`, which are neither the first two nor the newest, at once.

        A pool that keeps tensors per task outside of `TaskTensors` modules extends this method.
        """
        for part in self.modules():
            if isinstance(part, TaskTensors):
                part.make_room(tasks, self.num_tasks)
        self.num_tasks += len(tasks)
