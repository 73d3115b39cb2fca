"""DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning (Wang et al., ECCV 2022).

G-prompts, trained by every task, are key/value prefixes in some layers. E-prompts, one per task, are prefixes in others.
With query q:

    training:  E-prompt of the current task,   loss = CE - lambda * cosine(q, k_task)
    test:      E-prompt whose key is nearest to q, or (`task_inference`, ours) of the task whose classes fit q best

Only one kind of prompts, and prompts as tokens [P_G; P_E; x], are options (`e_layers=[]`, `prompt_form="tokens"`).

Prefixes are used after the key and value projections, as in all published code. There is one key for all E-layers, as in
the authors' code, or one for each (`keys_per_layer`), as in CODA-Prompt's repository.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.pool import Observation
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prefixes import split_prefix
from cl_prompts.methods.shared.prototypes import ClassPrototypes
from cl_prompts.methods.shared.queried import QueriedPool
from cl_prompts.methods.shared.regularizers import separation
from cl_prompts.methods.shared.selection import cosine_scores, top_k


class DualPromptPool(QueriedPool):
    """The DualPrompt pool. The rows of a prompt are its keys, then its values.

    Tensors: `g_prompts` [G-layers, rows, D], with `freeze_g` a buffer after the first task; `e_prompts.current` [E-layers,
    rows, D] and `.earlier` [tasks - 1, ...], frozen; `keys.current` [E-layers or 1, D] and `.earlier`, frozen; for
    task_inference="prototype" the class statistics `prototypes`. Without G-layers or E-layers their tensors do not exist.
    The ids of selected prompts are task numbers.
    """

    roles: ClassVar[dict[str, str]] = {"g_prompts": "prompts", "e_prompts.current": "prompts", "keys.current": "keys"}

    g_prompts: Tensor | None

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        one_row = config.split or config.prompt_form == "tokens"  # of a prompt for each of its length
        g_rows, e_rows = (n if one_row else 2 * n for n in (config.g_length, config.e_length))
        depth = len(config.e_layers)
        self.g_prompts = initial(config.prompt_init, len(config.g_layers), g_rows, shape.width) if config.g_layers else None
        if depth:
            self.e_prompts = PerTask(initial(config.prompt_init, depth, e_rows, shape.width))
            self.keys = PerTask(initial(config.key_init, depth if config.keys_per_layer else 1, shape.width))
        if config.infers_task:
            self.prototypes = ClassPrototypes(shape.width, config.task_statistics, config.covariance_shrinkage)

    @property
    def needs_query(self) -> bool:
        """False without E-prompts; else as for all `QueriedPool`s."""
        return bool(self.config.e_layers) and super().needs_query

    @property
    def layers(self) -> Sequence[int]:
        """G-layers and E-layers with prefixes; none with tokens."""
        return () if self.config.prompt_form == "tokens" else (*self.config.g_layers, *self.config.e_layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Freeze the current E-prompt and key, and start the next task's. With `freeze_g` the second task freezes G."""
        config = self.config
        if self.num_tasks == 1 and config.freeze_g:
            assert self.g_prompts is not None
            learned = self.g_prompts.detach().clone()
            del self.g_prompts
            self.register_buffer("g_prompts", learned)
        if self.num_tasks and config.e_layers:

            def fresh(init: str, earlier: Tensor) -> Tensor:
                return initial(init, *earlier.shape[1:]).detach()

            copied = config.task_init == "previous"
            self.e_prompts.next(None if copied else lambda earlier: fresh(config.prompt_init, earlier))
            self.keys.next(lambda earlier: fresh(config.key_init, earlier))
        super().begin_task(class_indices)
        if config.infers_task:
            self.prototypes.begin_task(class_indices, self.num_tasks - 1)

    @property
    def counts_images(self) -> bool:
        """With "prototype"."""
        return bool(self.config.infers_task)

    def observe(self, seen: Observation) -> None:
        """For "prototype", add the features of new images to the class statistics."""
        if self.config.infers_task and self.num_tasks and seen.query is not None and seen.targets is not None:
            self.prototypes.add(seen.query, seen.targets, seen.first_seen)

    def prompt_table(self) -> Tensor:
        """E-prompts [E-layers, tasks, rows, D]; without them G-prompts [G-layers, 1, rows, D]."""
        if not self.config.e_layers:
            assert self.g_prompts is not None
            return self.g_prompts[:, None]
        return self.e_prompts.all().transpose(0, 1)

    def key_table(self) -> Tensor | None:
        """[E-layers or 1, tasks, D]; None without E-prompts."""
        return None if not self.config.e_layers else self.keys.all().transpose(0, 1)

    def score(self, row: int, query: Tensor) -> Tensor:
        """Cosines with the tasks' keys [B, tasks]."""
        return cosine_scores(query, self.keys.all()[:, row if self.config.keys_per_layer else 0])

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The task of the first E-prompt."""
        return ids[..., 0] if self.num_tasks and self.config.e_layers else None

    def forward(self, batch: PoolInput) -> Prompts:
        """G-prompts, and E-prompts of the current task or, at test, of the inferred tasks."""
        answer = self._e_prompts(batch) if self.config.e_layers else Prompts()
        count = batch.batch_size * answer.candidates
        if self.g_prompts is not None and self.config.prompt_form == "tokens":
            g_rows = self.g_prompts[0].expand(count, -1, -1)
            answer.tokens = g_rows if answer.tokens is None else torch.cat([g_rows, answer.tokens], 1)
        elif self.g_prompts is not None:
            for row, block in enumerate(self.config.g_layers):
                answer.prefixes[block] = split_prefix(self.g_prompts[row].expand(count, -1, -1), self.heads)
        answer.tokens_after_cls = False
        if self.config.separation_weight and batch.task is not None:
            assert self.g_prompts is not None
            apart = separation(self.g_prompts.flatten(0, 1), self.e_prompts.current.flatten(0, 1))
            answer.losses["separation"] = LossPart(self.config.separation_weight * apart, "batch")
        return answer

    def _e_prompts(self, batch: PoolInput) -> Prompts:
        """Prefixes of the E-layers, or tokens, and the key loss."""
        config = self.config
        newest = self.keys.earlier.shape[0]
        candidates = min(config.ensemble, newest + 1) if batch.task is None else 1
        answer = Prompts(candidates=candidates, combine="mean")

        def of_task(row: int, ids: Tensor) -> PrefixKV:
            rows = self.e_prompts.of_tasks(ids[:, 0], row)
            return PrefixKV(rows, rows) if config.prompt_form == "tokens" else split_prefix(rows, self.heads)

        def by_key(row: int, query: Tensor) -> PrefixKV:
            """The prefix that the keys select, for queries [B, D], or [candidates * B, D] in one stage."""
            scores = self.score(row, query)
            if batch.task is not None:
                ids = torch.full_like(scores[:, :1], newest, dtype=torch.int64)
            else:
                ids = top_k(scores.detach(), candidates)
                if config.one_stage:  # candidate number n of an image gets the prompt of rank n
                    ids = ids.view(batch.batch_size, candidates, candidates).diagonal(dim1=1, dim2=2)
                else:
                    scores = scores.repeat_interleave(candidates, 0)
                ids = ids.reshape(-1, 1)
            own = scores.gather(1, ids)
            losses = {"pull": self.pull(own)} if batch.task is not None else {}
            return replace(of_task(row, ids), ids=ids, weights=own.detach(), scores=scores, losses=losses)

        if batch.task is None and config.infers_task and self.num_tasks:
            assert batch.query is not None
            tasks, answer.scores = self.prototypes.nearest_tasks(batch.query, candidates)
            answer.candidates = tasks.shape[1]
            answer.ids, answer.weights = tasks.reshape(-1, 1), answer.scores.gather(1, tasks).reshape(-1, 1)
            answer.prefixes = {block: of_task(row, answer.ids) for row, block in enumerate(config.e_layers)}
        elif config.keys_per_layer or config.one_stage:
            answer.prefixes = self.per_layer(config.e_layers, by_key, batch)
        else:  # one selection, and one key loss, for all layers
            assert batch.query is not None
            first = by_key(0, batch.query)
            assert first.ids is not None
            assert first.scores is not None
            answer.scores = first.scores[::candidates]
            answer.ids, answer.weights, answer.losses = first.ids, first.weights, first.losses
            answer.prefixes = {block: of_task(row, first.ids) for row, block in enumerate(config.e_layers)}
        if config.prompt_form == "tokens":
            answer.tokens = answer.prefixes.pop(0).k  # type: ignore[union-attr]
        return answer
