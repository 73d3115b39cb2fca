"""HiDe-Prompt: Hierarchical Decomposition of Prompt-Based Continual Learning (Wang et al., NeurIPS 2023); prompted stage.

Each task t has one prompt P_t: key/value prefixes behind the projections, in every layer its own. With tau the
`prompt_momentum`, features f of the batch and class means mu of the earlier tasks' classes:

    training:  prompt (1 - tau) P_t + tau * mean of P_0..P_(t-1), by which P_t is replaced when the task ends
               loss = CE + w * CE(M M^T / temperature, identity),  M = [mu; f],  mean over the rows of M
    test:      the prompt of the task that the image seems to belong to

The class means. Published: features of all training images with the finished prompt, in an extra pass when a task ends. A
pool has no images, so here (ours) each class keeps a running mean of the features that training shows: per batch with
images of the class, 0.9 * mean + 0.1 * theirs. A caller who makes that pass writes its means into `class_means`.

A pool is not told when the optimizer steps. Of a batch that is cut into parts (gradient accumulation) each part is a batch
here: it moves the means of its classes once, and the M of its contrastive term has its own f only.

The task. Published: a classifier of its own on un-prompted features. Here (ours) the class whose un-prompted features fit
best (`pools.prototypes`); `task_inference` takes another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prefix, Prompts
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.initialisation import initial
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prefixes import prefix_of
from cl_prompts.methods.shared.prototypes import ClassPrototypes
from cl_prompts.runtime.distributed import gather_with_gradient, sum_over_processes


MEAN_MOMENTUM = 0.9  # of the running class means


class HidePool(PromptPool, method="hide"):
    """The HiDe-Prompt pool.

    Tensors: `prompts.current` [layers, 2 (keys, values), Lp, D] and `.earlier` [tasks - 1, ...], frozen; `pending`, the
    weight of the earlier prompts' mean that is still to go into the current prompt: tau until the task ends, then 0;
    `class_means` [classes, D] by head column, zeros where a class has none yet; `prototypes`, of un-prompted features.

    Attributes:
        task_inference: whose task an image is, at test: un-prompted features [B, D] -> task numbers [B], or
            [B, `ensemble`] nearest first (as many as there are tasks, if fewer). None: by class statistics. Not saved.
    """

    roles: ClassVar[dict[str, str]] = {"prompts.current": "prompts"}
    pending: Tensor
    class_means: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.prompts = PerTask(initial(config.prompt_init, len(config.layers), 2, config.prompt_length, shape.width))
        self.prototypes = ClassPrototypes(shape.width, config.task_statistics, config.covariance_shrinkage)
        self.register_buffer("pending", torch.zeros(()))
        self.register_buffer("class_means", torch.zeros(0, shape.width))
        self.task_inference: Callable[[Tensor], Tensor] | None = None
        self._current: set[int] = set()  # head columns of the current task

    @property
    def needs_query(self) -> bool:
        """Un-prompted features tell the task; without tasks there is one prompt for all images."""
        return self.num_tasks > 0

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, columns: Sequence[int]) -> None:
        """Freeze the last prompt, start the next one, open rows of class means."""
        if self.num_tasks:
            copied = self.config.task_init == "previous"
            self.prompts.next(None if copied else self._fresh)
            self.pending = torch.full_like(self.pending, self.config.prompt_momentum)
        super().begin_task(columns)
        self._current = set(columns)
        self._open_means(max(columns))
        self.prototypes.begin_task(columns, self.num_tasks - 1)

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """Rows of class means, too."""
        super().make_room(tasks)
        self._open_means(max(map(max, tasks)))

    def _open_means(self, last: int) -> None:
        rows = max(0, last + 1 - len(self.class_means))
        self.class_means = torch.cat([self.class_means, self.class_means.new_zeros(rows, self.shape.width)])

    def _fresh(self, earlier: Tensor) -> Tensor:
        return initial(self.config.prompt_init, *earlier.shape[1:]).detach()

    @torch.no_grad()
    def end_task(self) -> None:
        """Replace the current prompt by the mix that was trained."""
        self.prompts.current.copy_(self.current_prompt())
        self.pending.zero_()

    def current_prompt(self) -> Tensor:
        """What training uses and the task will leave behind [layers, 2, Lp, D], with gradient."""
        if not len(self.prompts.earlier):
            return self.prompts.current
        return torch.lerp(self.prompts.current, self.prompts.earlier.mean(0), self.pending)

    def prompt_table(self) -> Tensor:
        """All tasks' prompts, keys and values as rows: [layers, tasks, 2 * Lp, D]."""
        every = torch.cat([self.prompts.earlier, self.current_prompt()[None]])
        return every.transpose(0, 1).flatten(2, 3)

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The task that an image seems to belong to most."""
        return ids[:, 0] if self.num_tasks else None

    def forward(self, batch: PoolInput) -> Prompts:
        """The current task's prompt in training; at test that of the task(s) an image seems to belong to."""
        current, scores, newest = self.current_prompt(), None, len(self.prompts.earlier)
        if batch.task is not None or not newest:
            ids = torch.full((batch.batch_size, 1), newest, device=current.device)
            rows = current.expand(batch.batch_size, *current.shape)
        else:
            assert batch.query is not None
            ids, scores = self._tasks_of(batch.query)
            rows = torch.cat([self.prompts.earlier, current[None]])[ids.flatten()]
        candidates = ids.shape[1]
        return Prompts(
            prefixes={layer: self.prefix(row, *rows[:, row].unbind(1)) for row, layer in enumerate(self.layers)},
            ids=ids.reshape(-1, 1),
            weights=torch.full((ids.numel(), 1), 1 / candidates, device=ids.device),
            scores=scores,
            candidates=candidates,
            combine="mean",
        )

    def prefix(self, row: int, keys: Tensor, values: Tensor) -> Prefix:
        """The prefix of layer number `row` of the pool, for keys and values [B, Lp, D]."""
        return prefix_of(keys, values, self.heads)

    def _tasks_of(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tasks whose prompts answer for each image [B, candidates], and what they were told by [B, tasks]."""
        candidates = min(self.config.ensemble, self.num_tasks)
        if self.task_inference is None:
            return self.prototypes.nearest_tasks(query, candidates)
        tasks = self.task_inference(query)
        ids = tasks[:, None] if tasks.dim() == 1 else tasks
        if ids.shape != (len(query), candidates):
            raise ValueError(
                f"task_inference gave task numbers of shape {list(tasks.shape)} for {len(query)} images: expected "
                f"[images, {candidates}], one for each prompt that answers (ensemble={self.config.ensemble})"
            )
        return ids, None

    def feature_losses(self, features: Tensor, columns: Tensor, counted: Tensor) -> dict[str, LossPart]:
        """The contrastive term, over the images of all processes."""
        if not self.config.contrastive_weight:
            return {}
        old = [column for column in range(len(self.class_means)) if column not in self._current]
        means = self.class_means[old]
        # padding may hold anything, and 0 * inf is no number
        own = torch.where(counted[:, None], features.float(), 0.0)
        rows = torch.cat([means, gather_with_gradient(own)])
        images = gather_with_gradient(counted.float()[:, None])[:, 0] > 0
        taken = torch.cat([means.any(1), images])
        value = self.config.contrastive_weight * contrastive(rows, taken, self.config.temperature)
        return {"contrastive": LossPart(value, "batch")}

    def observe(self, seen: Observation) -> None:
        """Follow the class means: of un-prompted features, each image once a task; of prompted ones, batch by batch."""
        if not self.num_tasks or seen.columns is None:
            return
        if seen.query is not None:
            self.prototypes.add(seen.query, seen.columns, seen.counted)
        if seen.features is not None and seen.real is not None:
            classes = torch.arange(len(self.class_means), device=seen.columns.device)
            member = ((seen.columns[:, None] == classes) & seen.real[:, None]).to(self.class_means)
            features = torch.where(seen.real[:, None], seen.features.to(self.class_means), 0.0)
            count = sum_over_processes(member.sum(0))[:, None]
            mean = sum_over_processes(member.T @ features) / count.clamp_min(1)
            known = self.class_means.any(1, keepdim=True)
            moved = torch.where(known, torch.lerp(mean, self.class_means, MEAN_MOMENTUM), mean)
            self.class_means.copy_(torch.where(count > 0, moved, self.class_means))


def contrastive(rows: Tensor, taken: Tensor, temperature: float) -> Tensor:
    """CE(M M^T / temperature, identity), mean over the rows of M: a scalar.

    Args:
        rows: [n, D].
        taken: the rows that M consists of [n].
        temperature: divides the dot products.
    """
    logits = (rows @ rows.T / temperature).masked_fill(~taken, float("-inf"))
    target = torch.arange(len(rows), device=rows.device).masked_fill(~taken, -100)
    return F.cross_entropy(logits, target, ignore_index=-100, reduction="sum") / taken.sum().clamp_min(1)
