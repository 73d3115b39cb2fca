"""The contract of a method: what a prompt pool must say and do. One method, one file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prompts
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prototypes import ClassPrototypes
from cl_prompts.methods.shared.regularisers import alignment, collapse, diversity


POOLS: dict[str, type[PromptPool]] = {}


@dataclass
class Observation:
    """What a training step showed, for a pool's statistics. All tensors are without gradient.

    Args:
        ids: prompts the step used, as in `Prompts.ids` or [B, layers, k] for prefixes chosen inside the attention.
        query: un-prompted features [B, D], or None.
        columns: head column of each image's class [B], or None without labels.
        counted: True where an image counts: real, and not counted before in this task [B].
        scores: what the step chose by, as in `Prompts.scores` or [B, layers, ..., M].
        features: what the classifier read [B, D].
        real: True for real images, counted before or not [B].
    """

    ids: Tensor | None
    query: Tensor | None
    columns: Tensor | None
    counted: Tensor
    scores: Tensor | None = None
    features: Tensor | None = None
    real: Tensor | None = None


class PromptPool(nn.Module, ABC):
    """Base of all methods. A subclass names itself: `class L2PPool(PromptPool, method="l2p")`.

    What is trained now lives in one stacked Parameter per kind of tensor. What the method freezes lives in buffers: a
    zero gradient does not freeze a row under momentum or weight decay.

    Args:
        config: the method's config.
        shape: sizes of the backbone.
    """

    # Parameter name -> group of `parameter_groups`: "prompts", "keys" or "routers".
    roles: ClassVar[dict[str, str]] = {}
    # Parameters of the group "prompts" whose rows are no prompt tokens.
    no_rows: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, method: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if method is not None:  # what several methods share is no method
            POOLS[method] = cls

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.num_tasks = 0
        self.rebuilding = False  # tasks are replayed for their shapes; values come from a file

    @property
    def needs_query(self) -> bool:
        """Whether `forward` or `observe` reads the un-prompted feature."""
        return True

    @property
    def layers(self) -> Sequence[int]:
        """Blocks that may get key/value prefixes."""
        return ()

    def begin_task(self, columns: Sequence[int]) -> None:
        """Grow for the next task, whose classes have the head `columns`. Also replayed to rebuild shapes for loading."""
        self.num_tasks += 1

    def rebuild(self, tasks: Sequence[Sequence[int]]) -> None:
        """Grow as `begin_task` for the columns of each of `tasks` would, in time linear in their number; values follow."""
        self.rebuilding = True
        for columns in tasks[:2]:
            self.begin_task(columns)
        if len(tasks) > 3:
            self.make_room(tasks[2:-1])
        for columns in tasks[2:][-1:]:
            self.begin_task(columns)
        self.rebuilding = False

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """Rows for `tasks` that are neither the first two nor the newest, all together.

        A pool extends it that keeps more by task than `PerTask`, `ActivationHistory` and `ClassPrototypes` do.
        """
        for part in self.modules():
            if isinstance(part, (PerTask, ActivationHistory)):
                part.make_room(len(tasks))
            elif isinstance(part, ClassPrototypes):
                part.make_room(tasks, self.num_tasks)
        self.num_tasks += len(tasks)

    def end_task(self) -> None:
        """Close the current task."""

    @property
    def heads(self) -> int | None:
        """Heads that prefix rows are cut into; None leaves them in the input space (`prefix_space`)."""
        return self.shape.num_heads if self.config.prefix_space == "projected" else None

    @abstractmethod
    def prompt_table(self) -> Tensor:
        """All prompts in use now, by group (layer, or head of a layer): [groups, M, rows, D], with gradient."""

    def key_table(self) -> Tensor | None:
        """The prompts' keys [groups or 1, M, D], with gradient; None without keys."""
        return None

    def regularisers(self, scores: Tensor | None, counted: Tensor) -> dict[str, LossPart]:
        """The config's `diversity_weight`, `alignment_weight` and `entropy_weight` as terms of the training loss.

        Args:
            scores: as in `Observation`, [B, M] or [B, layers, M], with gradient.
            counted: True for real images [B].
        """
        config, parts = self.config, {}
        if config.diversity_weight:
            parts["diversity"] = config.diversity_weight * diversity(self.prompt_table().flatten(2))
        keys = self.key_table()
        if config.alignment_weight and keys is not None:
            parts["alignment"] = config.alignment_weight * alignment(self.prompt_table(), keys)
        if config.entropy_weight and scores is not None:
            parts["collapse"] = config.entropy_weight * collapse(scores, counted)
        return {name: LossPart(value, "batch") for name, value in parts.items()}

    def feature_losses(self, features: Tensor, columns: Tensor, counted: Tensor) -> dict[str, LossPart]:
        """Terms of the training loss on what the classifier reads.

        Args:
            features: [B, D], with gradient.
            columns: head column of each image's class [B]; -100 for padding.
            counted: True for real images [B].
        """
        return {}

    @torch.no_grad()
    def fill_prompts(self, vectors: Tensor, generator: torch.Generator | None = None) -> None:
        """Overwrite the trainable prompts, row by row, with `vectors` [n, D] (patch embeddings) that `generator` draws."""
        for name, role in self.roles.items():
            tensor = self._tensor(name)
            if role == "prompts" and name not in self.no_rows and isinstance(tensor, nn.Parameter):
                rows = torch.randint(len(vectors), (tensor.numel() // vectors.shape[1],), generator=generator)
                tensor.copy_(vectors[rows.to(vectors.device)].view_as(tensor))

    def _tensor(self, name: str) -> Any:
        owner, _, last = name.rpartition(".")
        return getattr(self.get_submodule(owner), last)

    @abstractmethod
    def forward(self, batch: PoolInput) -> Prompts:
        """Choose and build the prompts of a `batch`."""

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """Task whose prompts answer most for each image of a test pass: [B], or [B, layers] where each layer chooses.

        None where prompts belong to no single task, or are not chosen by task.

        Args:
            ids: as `prompt_ids` of `PromptPoolOutput`, [B, k] or [B, layers, k].
            weights: as its `prompt_weights`, likewise [B, k] or [B, layers, k].
            query: as its `query`, [B, D].
        """
        return None

    def observe(self, seen: Observation) -> None:
        """Take statistics of a training step, `seen`; sums over processes are the pool's business."""

    def update_factors(self) -> dict[str, Tensor]:
        """Factors in [0, 1], by parameter name, that scale the steps an optimizer takes (broadcast to the parameter)."""
        return {}
