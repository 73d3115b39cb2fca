"""HiDe-Prompt: Hierarchical Decomposition of Prompt-Based Continual Learning (Wang et al., NeurIPS 2023); prompted stage.

Each task t has one prompt P_t: key/value prefixes after the projections, different in every layer. With tau =
`prompt_momentum`, features f of the batch and class means mu of the earlier tasks' classes:

    training:  prompt (1 - tau) P_t + tau * mean of P_0..P_(t-1), which replaces P_t when the task ends
               loss = CE + w * CE(M M^T / temperature, identity),  M = [mu; f],  mean over the rows of M
    test:      the prompt of the inferred task

Class means. Published: features of all training images with the final prompt, in an extra pass at the end of a task. A pool
has no images, so here (ours) each class has a running mean of the features seen in training: for a batch with images of the
class, 0.9 * mean + 0.1 * mean of the batch. A caller who makes the extra pass can write its means into `class_means`. With
w = 0 no means are kept.

With gradient accumulation, each part of a batch counts as a batch: it updates the means of its classes once, and the M of
its contrastive term has the features of this part only.

Task inference. Published: a classifier on un-prompted features. Here (ours): the class statistics of `ClassPrototypes`, or
any function given as `task_inference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_prompts.heads.class_groups import ClassGroups
from cl_prompts.heads.class_means import class_means, class_sums
from cl_prompts.interfaces import IGNORE_INDEX, BackboneShape, LossPart, PoolInput, Prefix, Prompts
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.per_task import PerTask, chosen
from cl_prompts.methods.shared.prefixes import prefix_of
from cl_prompts.methods.shared.prototypes import ClassPrototypes
from cl_prompts.runtime.distributed import gather_with_gradient


MEAN_MOMENTUM = 0.9  # of the running class means
CHUNK = 1024  # class means that are compared with all others at once


class HidePool(PromptPool):
    """The HiDe-Prompt pool.

    Tensors: `prompts.current` [layers, 2 (keys, values), Lp, D] and `.earlier` [tasks - 1, ...], frozen; `pending`, the
    weight with which the mean of the earlier prompts is mixed into the current prompt: tau during a task, 0 after its end,
    when the mix is stored; `class_means` [classes, D] by class index, zeros for a class without a mean; `prototypes`, class
    statistics of un-prompted features.

    Attributes:
        task_inference: function un-prompted features [B, D] -> task numbers [B] or [B, `ensemble`] (at most the number of
            tasks), nearest first. None: by class statistics. Not saved.
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
        self._current: set[int] = set()  # class indices of the current task
        self._compared: tuple[Tensor, Tensor] | None = None  # means of old classes and their `among`

    @property
    def needs_query(self) -> bool:
        """True with tasks, which are inferred from un-prompted features; without tasks there is one prompt."""
        return self.num_tasks > 0

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Freeze the current prompt, start the next one, and add rows of class means."""
        if self.num_tasks:
            copied = self.config.task_init == "previous"
            self.prompts.next(None if copied else self._fresh)
            self.pending = torch.full_like(self.pending, self.config.prompt_momentum)
        super().begin_task(class_indices)
        self._current = set(class_indices)
        self._add_means(max(class_indices, default=-1))
        self.prototypes.begin_task(class_indices, self.num_tasks - 1)

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """See `PromptPool`; adds rows of class means."""
        super().make_room(tasks)
        self._add_means(max((index for task in tasks for index in task), default=-1))

    def group_classes(self, groups: ClassGroups) -> None:
        """See `PromptPool`: forget and merge as `groups` says; the mean of merged classes is that of their means."""
        super().group_classes(groups)
        rows = len(self.class_means)  # fewer than classes if prompts are frozen after the first task
        first = [[old for old in group if old < rows] for group in groups.members]
        means = [self.class_means[group][self.class_means[group].any(1)] for group in first if group]
        sums = [mean.sum(0) / max(len(mean), 1) for mean in means]
        self.class_means = torch.stack(sums) if sums else self.class_means[:0]

    def _add_means(self, last: int) -> None:
        rows = max(0, last + 1 - self.class_means.shape[0])
        self.class_means = torch.cat([self.class_means, self.class_means.new_zeros(rows, self.shape.width)])

    def _fresh(self, earlier: Tensor) -> Tensor:
        return initial(self.config.prompt_init, *earlier.shape[1:]).detach()

    @torch.no_grad()
    def end_task(self) -> None:
        """Store the mix that was trained as the current prompt."""
        self.prompts.current.copy_(self.current_prompt())
        self.pending.zero_()

    def current_prompt(self) -> Tensor:
        """The current prompt, mixed with the earlier ones [layers, 2, Lp, D], with gradient."""
        if not self.prompts.earlier.shape[0]:
            return self.prompts.current
        return torch.lerp(self.prompts.current, self.prompts.earlier.mean(0), self.pending)

    def prompt_table(self) -> Tensor:
        """All tasks' prompts, keys and values as rows: [layers, tasks, 2 * Lp, D]."""
        every = torch.cat([self.prompts.earlier, self.current_prompt()[None]])
        return every.transpose(0, 1).flatten(2, 3)

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The inferred task."""
        return ids[:, 0] if self.num_tasks else None

    def forward(self, batch: PoolInput) -> Prompts:
        """The current task's prompt in training, those of the inferred tasks at test.

        Raises:
            ValueError: `task_inference` returned task numbers of another shape.
        """
        current, scores, newest = self.current_prompt(), None, self.prompts.earlier.shape[0]
        if batch.task is not None or not newest:
            ids = torch.full((batch.batch_size, 1), newest, device=current.device)
            rows = current.expand(batch.batch_size, *current.shape)
        else:
            assert batch.query is not None
            ids, scores = self._tasks_of(batch.query)
            rows = chosen(ids.flatten(), self.prompts.earlier, current)
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
        """The prefix of the pool's layer number `row`, for `keys` [B, Lp, D] and `values` [B, Lp, D]."""
        return prefix_of(keys, values, self.heads)

    def _tasks_of(self, query: Tensor) -> tuple[Tensor, Tensor | None]:
        """Inferred tasks of each image [B, candidates], nearest first, and their scores [B, tasks] if there are."""
        candidates = min(self.config.ensemble, self.num_tasks)
        if self.task_inference is None:
            return self.prototypes.nearest_tasks(query, candidates)
        tasks = self.task_inference(query)
        ids = tasks[:, None] if tasks.dim() == 1 else tasks
        if ids.shape != (query.shape[0], candidates):
            raise ValueError(
                f"task_inference gave task numbers of shape {list(tasks.shape)} for {query.shape[0]} images: expected "
                f"[images, {candidates}], one for each prompt that is used (ensemble={self.config.ensemble})"
            )
        return ids, None

    def feature_losses(self, features: Tensor, targets: Tensor, valid: Tensor) -> dict[str, LossPart]:
        """The contrastive term, over the images of all processes; the means follow their features then."""
        if not self.config.contrastive_weight:
            return {}
        old = [index for index in range(self.class_means.shape[0]) if index not in self._current]
        means = self.class_means[old]
        own = torch.where(valid[:, None], features.float(), 0.0)  # padding may hold NaN, and 0 * NaN is NaN
        everywhere = gather_with_gradient(own)
        of_images = gather_with_gradient(torch.where(valid, targets, IGNORE_INDEX))
        term = contrastive(means, self._among(means), everywhere, of_images >= 0, self.config.temperature)
        value = self.config.contrastive_weight * term
        self._follow(everywhere.detach(), of_images)
        return {"contrastive": LossPart(value, "batch")}

    def _among(self, means: Tensor) -> Tensor:
        """`among` of `contrastive` for the `means` of old classes, which change within a task only by rehearsal."""
        if means.device.type != "cpu" or torch.compiler.is_compiling():  # comparing would wait for the device
            return among(means, self.config.temperature)
        if self._compared is None or not torch.equal(self._compared[0], means):
            self._compared = means, among(means, self.config.temperature)
        return self._compared[1]

    def _follow(self, features: Tensor, targets: Tensor) -> None:
        """Move the running means of the classes of a batch: `features` [B, D] and `targets` [B] of all processes."""
        sums, counts = class_sums(features, targets, range(self.class_means.shape[0]), dtype=torch.float32)
        mean = class_means(sums, counts)
        known = self.class_means.any(1, keepdim=True)
        moved = torch.where(known, torch.lerp(mean, self.class_means, MEAN_MOMENTUM), mean)
        self.class_means.copy_(torch.where(counts[:, None] > 0, moved, self.class_means))

    def observe(self, seen: Observation) -> None:
        """Add new images to the class statistics."""
        if self.num_tasks and seen.targets is not None and seen.query is not None:
            self.prototypes.add(seen.query, seen.targets, seen.first_seen)


@torch.no_grad()
def among(means: Tensor, temperature: float) -> Tensor:
    """log of the sum of exp(mu_i mu_j / temperature) over the means mu_j that are not 0, for each row mu_i: [n].

    Args:
        means: [n, D].
        temperature: divides the dot products.
    """
    empty = ~means.any(1)
    chunks = [(rows @ means.T / temperature).masked_fill(empty, float("-inf")).logsumexp(1) for rows in means.split(CHUNK)]
    return torch.cat(chunks)


def contrastive(means: Tensor, among_means: Tensor, features: Tensor, taken: Tensor, temperature: float) -> Tensor:
    """CE(M M^T / temperature, identity), mean over the rows of M = [means that are not 0; features]: a scalar.

    The products of means with means, of which there are most, have no gradient and are given by their sums.

    Args:
        means: [n, D], without gradient.
        among_means: `among` of them [n].
        features: [B, D].
        taken: True for the features that are rows of M [B].
        temperature: divides the dot products.
    """
    known = means.any(1)
    across, within = means @ features.T / temperature, features @ features.T / temperature
    of_means = torch.cat([among_means[:, None], across.masked_fill(~taken, float("-inf"))], 1)
    of_features = torch.cat([across.T.masked_fill(~known, float("-inf")), within.masked_fill(~taken, float("-inf"))], 1)
    each = [_cross_entropies(of_means, means.square().sum(1) / temperature, known)]
    each.append(_cross_entropies(of_features, within.diagonal(), taken))
    return torch.cat(each).sum() / (known.sum() + taken.sum()).clamp_min(1)


def _cross_entropies(logits: Tensor, own: Tensor, rows: Tensor) -> Tensor:
    """log-sum-exp of `logits` [n, m] minus the logit of the target, `own` [n]; 0 where `rows` [n] is False."""
    # Rows that are left out may have no number but -inf, whose logsumexp has no gradient.
    return torch.where(rows, logits.masked_fill(~rows[:, None], 0.0).logsumexp(1) - own, 0.0)
