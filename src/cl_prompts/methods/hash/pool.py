"""Hash: History-Aware prompt-SHaring (Li et al., CVPR 2026, arXiv 2601.20894). Our reading; no code is public.

Each layer has one pool of M prompts p_m [Lp, D], shared by all tasks, and one router W_t [M, D] per task t. With the
block's input x [N, D] before its norm:

    s        = mean over tokens of x W_t^T / sqrt(D) - phi(H)        routing scores with the HDR penalty
    selected = the k largest of s,  w = softmax(s_selected)
    p        = sum_selected w_m p_m;  first half -> keys, second half -> values, in front of the block's own
    the update of p_m in training is scaled by psi(H_m)              HGM

Options change s: x after a layer norm (`router_input`), a factor before the penalty (`router_scale`), and phi(H) times the
range of the image's scores (`relative_delta`).

H counts the images of earlier tasks that used a prompt. At test each router has the penalty of its training, so that it
selects what it would have selected then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prefix, PrefixKV, Prompts
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory, ScaleGradient, routing_penalty, update_factor
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.per_task import PerTask
from cl_prompts.methods.shared.prefixes import split_prefix
from cl_prompts.methods.shared.prototypes import ClassPrototypes


@dataclass
class TokenRouter:
    """Selects and mixes one layer's prompts by the block's input; called inside the attention.

    Args:
        prompts: the layer's prompts [M, Lp, D].
        routers: router weights [R, M, D].
        penalties: their routing penalties [R, M].
        which: router of each image [B]; None if there is one router.
        top_k: prompts per image.
        heads: number of attention heads; None keeps the prefix in the input space.
        normed: whether tokens pass a layer norm without weights.
        relative: whether penalties are in units of the range of the scores.
    """

    prompts: Tensor
    routers: Tensor
    penalties: Tensor
    which: Tensor | None
    top_k: int
    heads: int | None
    normed: bool = False
    relative: bool = False

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix of each image for a block input [B, N, D]. Scores and mixing are in float32."""
        with torch.autocast(block_input.device.type, enabled=False):
            # The router is linear, so the mean over tokens can be taken first.
            tokens = F.layer_norm(block_input.float(), block_input.shape[2:]) if self.normed else block_input
            mean = tokens.mean(1, dtype=torch.float32)
            scores = F.linear(mean, self.routers.flatten(0, 1)) / math.sqrt(mean.shape[1])
            scores = scores.unflatten(1, self.routers.shape[:2])
            penalties = self.penalties
            if self.relative:
                penalties = penalties * (scores.amax(2, keepdim=True) - scores.amin(2, keepdim=True)).detach()
            scores = scores - penalties
            if self.which is None:
                scores = scores[:, 0]
            else:
                scores = scores[torch.arange(scores.shape[0], device=scores.device), self.which]
            best, ids = scores.topk(self.top_k, dim=1)
            weights = best.softmax(dim=1)
            mixed = F.embedding_bag(ids, self.prompts.flatten(1), per_sample_weights=weights, mode="sum")
            prefix = split_prefix(mixed.view(ids.shape[0], *self.prompts.shape[1:]), self.heads)
        return replace(prefix, ids=ids, weights=weights.detach(), scores=scores)


class HashPool(PromptPool):
    """The Hash pool.

    Tensors: `prompts` [layers (1 if shared), M, Lp, D]; `router` [layers, M, D] of the current task; `old_routers`
    [tasks - 1, layers, M, D], frozen; `history.counts` [tasks, layers, M]; with `learn_router_scale` `scale.current`
    [layers] and `scale.earlier` [tasks - 1, layers], frozen; for router_inference="prototype" the class
    statistics `prototypes`; for modulate="quadratic" the prompts at the start of the task, `anchor`.
    """

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts", "router": "routers", "scale.current": "routers"}
    old_routers: Tensor
    anchor: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        depth, size, width = len(config.layers), config.pool_size, shape.width
        self.prompts = initial(config.prompt_init, 1 if config.share_layers else depth, size, config.prompt_length, width)
        self.router = initial("normal", depth, size, width)
        self.history = ActivationHistory((depth,), size)
        self.register_buffer("old_routers", torch.zeros(0, depth, size, width))
        if config.learn_router_scale:
            self.scale = PerTask(nn.Parameter(torch.full((depth,), float(config.router_scale))))
        if config.infers_task:
            self.prototypes = ClassPrototypes(width, config.task_statistics, config.covariance_shrinkage)
        if config.modulate == "quadratic":
            self.register_buffer("anchor", torch.zeros_like(self.prompts))

    @property
    def needs_query(self) -> bool:
        """True for router_inference="prototype", whose class statistics are of un-prompted features."""
        return bool(self.config.infers_task)

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Freeze the current router, start a new one, and add rows of counts and class statistics."""
        if self.num_tasks:
            closed = self.router.detach()[None]
            # PEFT's low_cpu_mem_usage builds parameters on the meta device, but not buffers.
            self.old_routers = torch.cat([self.old_routers.to(closed.device), closed])
            start = self.router.detach().clone()
            if self.config.router_init == "normal":
                start.normal_(std=0.02)
            self.router = nn.Parameter(start, requires_grad=self.router.requires_grad)
            if self.config.learn_router_scale:
                self.scale.next()
        super().begin_task(class_indices)
        self.history.begin_task()
        if self.needs_query:
            self.prototypes.begin_task(class_indices, self.num_tasks - 1)
        if self.config.modulate == "quadratic":
            self.anchor = self.prompts.detach().clone()

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """See `PromptPool`; adds routers."""
        super().make_room(tasks)
        rows = self.router.detach().expand(len(tasks), *self.router.shape).clone()
        if self.config.router_init == "normal":
            rows.normal_(std=0.02)
        self.old_routers = torch.cat([self.old_routers.to(rows.device), rows])

    def forward(self, batch: PoolInput) -> Prompts:
        """One prefix function per layer, with the current router in training and those of `router_inference` at test."""
        rule = "last" if batch.task is not None or self.num_tasks <= 1 else self.config.router_inference
        which, candidates = None, 1
        if rule == "last":
            newest = max(self.num_tasks - 1, 0)
            history = self._history(self.num_tasks if self._own_counts else newest)[None]
            routers, penalties = self._scaled(self.router[None]), routing_penalty(history, self.config)
        else:
            routers = self._scaled(torch.cat([self.old_routers, self.router[None]]))
            history = self.history.before_each(self.config.history_decay, own=self._own_counts)
            penalties = routing_penalty(history, self.config)
        if rule == "average":
            routers, penalties = routers.mean(0, keepdim=True), penalties.mean(0, keepdim=True)
        elif rule == "prototype":
            assert batch.query is not None
            which = self.prototypes.nearest_task(batch.query)
        elif rule == "confidence":
            candidates = routers.shape[0]
            which = torch.arange(candidates, device=routers.device).repeat(batch.batch_size)

        prompts = self._modulated_prompts()
        prefixes: dict[int, Prefix] = {}
        for row, layer in enumerate(self.layers):
            pool = prompts[0 if self.config.share_layers else row]
            prefixes[layer] = TokenRouter(
                pool,
                routers[:, row],
                penalties[:, row],
                which,
                self.config.top_k,
                self.heads,
                normed=self.config.router_input == "normed",
                relative=self.config.relative_delta,
            )
        answer = Prompts(prefixes=prefixes, candidates=candidates)
        if batch.task is not None and self.config.modulate == "quadratic" and self.config.hgm != "none":
            answer.losses["history"] = LossPart(self._drift_from_anchor(), "batch")
        return answer

    def chosen_tasks(self, ids: Tensor, weights: Tensor | None, query: Tensor | None) -> Tensor | None:
        """The task of the router, for router_inference="prototype"."""
        if self.config.router_inference != "prototype" or not self.num_tasks or query is None:
            return None
        return self.prototypes.nearest_task(query)

    def prompt_table(self) -> Tensor:
        """[layers (1 if shared), M, Lp, D]."""
        return self.prompts

    def observe(self, seen: Observation) -> None:
        """Count activations [B, layers, k] and, for "prototype", add features to the class statistics."""
        if not self.num_tasks:
            return
        if seen.ids is not None:
            self.history.add(seen.ids, seen.first_seen)
            if self._own_counts:  # the next step reads them
                self.history.gather()
        if self.needs_query and seen.query is not None and seen.targets is not None:
            self.prototypes.add(seen.query, seen.targets, seen.first_seen)

    def update_factors(self) -> dict[str, Tensor]:
        """psi(H) for the steps of the prompts, with modulate="update"."""
        return {"prompts": self._factor()} if self.config.hgm != "none" and self.config.modulate == "update" else {}

    @property
    def _own_counts(self) -> bool:
        """Whether a task's penalty has its own counts."""
        return self.config.history_update == "step"

    def _scaled(self, routers: Tensor) -> Tensor:
        """The newest `routers` [R, layers, M, D] times their scale."""
        if self.config.learn_router_scale:
            return routers * self.scale.all()[-len(routers) :, :, None, None]
        return routers if self.config.router_scale == 1.0 else routers * self.config.router_scale

    def _history(self, task: int) -> Tensor:
        return self.history.before(task, self.config.history_decay)

    def _prompt_history(self) -> Tensor:
        """H of each row of `prompts` [layers, M]; summed over layers [1, M] if they share prompts."""
        history = self._history(max(self.num_tasks - 1, 0))
        return history.sum(0, keepdim=True) if self.config.share_layers else history

    def _factor(self) -> Tensor:
        return update_factor(self._prompt_history(), self.config)[:, :, None, None]

    def _modulated_prompts(self) -> Tensor:
        if self.config.hgm != "none" and self.config.modulate == "gradient":
            return ScaleGradient.apply(self.prompts, self._factor())
        return self.prompts

    def _drift_from_anchor(self) -> Tensor:
        moved = (self.prompts - self.anchor).square().sum((2, 3))
        return self.config.zeta / 2 * (self._prompt_history().float() * moved).sum()
