"""CODA-Prompt: COntinual Decomposed Attention-based Prompting (Smith et al., CVPR 2023).

Per layer, components P_m [Lp, D] with keys K_m and attention vectors A_m [D]. For an image with query q:

    w_m  = cosine(q * A_m, K_m)                 * is elementwise; no softmax, may be negative   (eq. 5)
    p    = sum_m w_m P_m;  first half of its rows -> keys, second half -> values                (eq. 3)
    loss = CE + mu * sum over layers and X in {K, A, P} of mean((X X^T - I)^2)                  (eq. 7)

With `adaptive_orthogonality` (ours) a pair of components of different tasks counts with 1 - the tasks' similarity.

Each task adds components that start orthogonal to the earlier ones (Gram-Schmidt). Those of earlier tasks are frozen, but
keep contributing. The number of tasks need not be known in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.pool import Observation
from cl_prompts.methods.shared.initialization import gram_schmidt
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prefixes import split_prefix
from cl_prompts.methods.shared.queried import QueriedPool
from cl_prompts.methods.shared.regularizers import orthogonality
from cl_prompts.methods.shared.task_means import TaskMeans


class CodaPool(QueriedPool):
    """The CODA-Prompt pool; c is `components_per_task`.

    Tensors, each as `.current` (trained) and `.earlier` [tasks - 1, ...] (frozen): `components` [layers, c, Lp, D],
    `keys` and `attention` [layers, c, D]. With `adaptive_orthogonality` the mean queries, `task_means`.
    """

    roles: ClassVar[dict[str, str]] = {
        "components.current": "prompts",
        "keys.current": "keys",
        "attention.current": "keys",
    }

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        depth, count, width = len(config.layers), config.components_per_task, shape.width
        self.components = PerTask(nn.Parameter(torch.zeros(depth, count, config.prompt_length, width)), by_row=True)
        self.keys = PerTask(nn.Parameter(torch.zeros(depth, count, width)), by_row=True)
        self.attention = PerTask(nn.Parameter(torch.zeros(depth, count, width)), by_row=True)
        for tensor in (self.components, self.keys, self.attention):
            tensor.current = nn.Parameter(new_rows(tensor.earlier))
        if config.adaptive_orthogonality:
            self.task_means = TaskMeans(width)

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Freeze the current components and add orthogonal ones."""
        if self.num_tasks:
            for tensor in (self.components, self.keys, self.attention):
                tensor.next(room_for_rows if self.rebuilding else new_rows)
        super().begin_task(class_indices)
        if self.config.adaptive_orthogonality:
            self.task_means.begin_task()

    @property
    def counts_images(self) -> bool:
        """With adaptive orthogonality."""
        return bool(self.config.adaptive_orthogonality)

    def observe(self, seen: Observation) -> None:
        """For adaptive orthogonality, add the queries of new images to the task's mean, which the next step reads."""
        if self.config.adaptive_orthogonality and self.num_tasks and seen.query is not None:
            self.task_means.add(seen.query, seen.first_seen)
            self.task_means.gather()

    def prompt_table(self) -> Tensor:
        """Components in use [layers, tasks * c, Lp, D]."""
        return in_use(self.components)

    def key_table(self) -> Tensor | None:
        """Keys in use [layers, tasks * c, D]."""
        return in_use(self.keys)

    def score(self, row: int, query: Tensor) -> Tensor:
        """w_m = cosine(q * A_m, K_m) for queries [B, D]: [B, tasks * c]."""
        return torch.cat(self.scores_of_parts(row, query), 1)

    def scores_of_parts(self, row: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, earlier] of earlier tasks' components, whose keys are frozen, and [B, current] of the current task's.

        Joined keys would be copied in each step, and gradients computed for all of them.

        Args:
            row: number of the layer.
            query: un-prompted features [B, D].
        """
        earlier, current = (
            cosines(query, attention, keys)
            for attention, keys in zip(in_layer(self.attention, row), in_layer(self.keys, row), strict=True)
        )
        return earlier, current

    def forward(self, batch: PoolInput) -> Prompts:
        """One mixed prefix per layer."""
        answer = Prompts(
            prefixes=self.per_layer(
                list(self.layers),
                lambda row, query: self.mix(row, *self.scores_of_parts(row, query), learning=batch.task is not None),
                batch,
            )
        )
        weight = self.config.orthogonality_weight
        if weight and batch.task is not None:
            pairs = None
            if self.config.adaptive_orthogonality and self.num_tasks:
                count = self.config.components_per_task
                pairs = (1 - self.task_means.similarity()).repeat_interleave(count, 0).repeat_interleave(count, 1)
            tables = (self.keys, self.attention, self.components)
            penalty = sum(orthogonality(in_use(x).flatten(2), pairs) for x in tables)
            answer.losses["orthogonality"] = LossPart(weight * penalty, "batch")
        return answer

    def mix(self, row: int, old: Tensor, new: Tensor, *, learning: bool) -> PrefixKV:
        """The sum of the components of layer number `row`, weighted by scores; subclasses use `learning`.

        Args:
            row: number of the layer in `layers`.
            old: scores of the components of earlier tasks [B, (tasks - 1) * c].
            new: scores of those of the current task [B, c].
            learning: whether the image is a training image.
        """
        earlier, current = in_layer(self.components, row)
        mixed = (old @ earlier.flatten(1) + new @ current.flatten(1)).unflatten(1, current.shape[1:])
        scores = torch.cat([old, new], 1)
        ids = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[0], -1)
        return replace(split_prefix(mixed, self.heads), ids=ids, weights=scores.detach(), scores=scores)


class CodaLayerArgmaxPool(CodaPool):
    """One component per layer, that with the best score for the layer's own CLS, as some texts describe CODA-Prompt.

    The value of the forward is the selected component. The gradient of its score is that of the weighted sum (straight
    through), so that keys and attention vectors learn. In training only the current task's components can be selected
    (ours): the trained keys of earlier tasks would win, and new components would never learn. At test all can.
    `entropy_weight` is the diversity loss on the selection.
    """

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The task that added each layer's component."""
        return ids[..., 0] // self.config.components_per_task if self.num_tasks else None

    def mix(self, row: int, old: Tensor, new: Tensor, *, learning: bool) -> PrefixKV:
        """The component of layer `row` with the best score; if `learning`, of the current task's only."""
        scores = new if learning else torch.cat([old, new], 1)
        best, ids = scores.max(1, keepdim=True)
        ids = ids + (old.shape[1] if learning else 0)
        count = self.config.components_per_task
        of_task = self.components.of_tasks(ids[:, 0] // count, row)  # [B, c, Lp, D]
        chosen = of_task[torch.arange(ids.shape[0], device=ids.device), ids[:, 0] % count]
        rows = chosen * (1 + best - best.detach())[:, :, None]
        return replace(split_prefix(rows, self.heads), ids=ids, weights=best.detach(), scores=scores)


def in_use(tensor: PerTask) -> Tensor:
    """All tasks' rows of a tensor [layers, c, ...]: [layers, tasks * c, ...]."""
    return tensor.all().transpose(0, 1).flatten(1, 2)


def in_layer(tensor: PerTask, row: int) -> tuple[Tensor, Tensor]:
    """The rows of one layer: those of earlier tasks [(tasks - 1) * c, ...], not copied, and the current task's [c, ...]."""
    return tensor.earlier[:, row].flatten(0, 1), tensor.current[row]


def cosines(query: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    """cosine(q * A_m, K_m) for queries [B, D], `attention` [M, D] and `keys` [M, D]: [B, M]."""
    # |q * A|^2 = q^2 . A^2 needs no tensor [B, M, D].
    length = (query.square() @ attention.square().T).clamp_min(1e-12).sqrt()
    return query @ (attention * keys).T / length / keys.norm(dim=1).clamp_min(1e-12)


def room_for_rows(earlier: Tensor) -> Tensor:
    """Zeros of the size of a task's rows, for values that come from a file."""
    return earlier.new_zeros(earlier.shape[1:])


def new_rows(earlier: Tensor) -> Tensor:
    """A task's new rows [layers, c, ...], orthonormal to each other and orthogonal to `earlier` [tasks, layers, c, ...]."""
    size = earlier.shape[1:]
    if earlier.is_meta:  # only shapes are needed
        return room_for_rows(earlier)
    raw = torch.randn(*size).to(earlier.device).flatten(2)
    before = earlier.transpose(0, 1).flatten(1, 2).flatten(2)
    return torch.stack([gram_schmidt(*layer) for layer in zip(raw, before, strict=True)]).view(size)
