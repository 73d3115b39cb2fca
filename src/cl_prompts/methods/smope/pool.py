"""SMoPE: sparse mixture of prompt experts (Le et al., "One-Prompt Strikes Back", ICLR 2026).

Each prefix layer has E rows of keys and values, shared by all tasks. The slice of row e for head h is one of that head's
experts, (k_e, v_e). With the attention queries q_n of an image's N tokens in that head:

    score_e  = mean over n of q_n . k_e                              one pass, no query feature
    selected = the K largest of score_e - pen_e * (max score - min score)
    the attention logit of every token for a selected expert is score_e / sqrt(d); its value is v_e

In training, pen_e is epsilon for experts that earlier tasks used frequently. At test it is 2, which excludes an expert, for
experts that no task used. The training loss adds, for each layer and head, with CE over the E experts, summed over K ranks:

    router:     CE(score + epsilon * range if not selected, selected), mean over images
    prototype:  CE(u . keys, the K largest of u . old keys), mean over u = old keys of frequently used experts

Old keys are the keys at the end of the previous task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prefix, PrefixKV, Prompts
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.selection import histogram
from cl_prompts.runtime.distributed import sum_over_processes, world_size
from cl_prompts.runtime.gathered import GatheredStatistics


EXCLUDED = 2.0  # penalty in units of the range of the scores, as in the released code


@dataclass
class ExpertRouter:
    """Selects each head's experts of one layer; called inside the attention.

    Args:
        keys: expert keys [H, E, d].
        values: expert values [H, E, d].
        penalty: penalty on each expert's score, in units of the range of the scores [H, E].
        top_k: experts per head.
        epsilon: margin of the router loss.
        loss_weight: weight of the router loss, 0 at test.
    """

    keys: Tensor
    values: Tensor
    penalty: Tensor
    top_k: int
    epsilon: float
    loss_weight: float

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix for attention queries [B, H, N, d]. Scores and selection are in float32."""
        with torch.autocast(queries.device.type, enabled=False):
            mean = queries.mean(2, dtype=torch.float32)
            scores = torch.einsum("bhd,hed->bhe", mean, self.keys)
            span = (scores.amax(2, keepdim=True) - scores.amin(2, keepdim=True)).detach()
            ids = (scores.detach() - self.penalty * span).topk(self.top_k, dim=2).indices
            selected = scores.gather(2, ids)
            heads, experts, width = self.values.shape
            first = experts * torch.arange(heads, device=ids.device)[:, None]
            values = F.embedding(ids + first, self.values.flatten(0, 1))
            # Keys are zero, so that the attention logit is the bias, which is the same for all tokens.
            bias = (selected / math.sqrt(width))[:, :, None].expand(-1, -1, queries.shape[2], -1)
            losses = {"router": LossPart(self._loss(scores, ids, span), "mean")} if self.loss_weight else {}
        weights = selected.detach()
        return PrefixKV(torch.zeros_like(values), values, bias, ids=ids, weights=weights, scores=scores, losses=losses)

    def _loss(self, scores: Tensor, ids: Tensor, span: Tensor) -> Tensor:
        margin = (self.epsilon * span).expand_as(scores).scatter(2, ids, 0.0)
        return self.loss_weight * cross_entropies(scores + margin, ids).sum(1)


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy over [..., E], summed over several targets [..., k]: [...]."""
    return targets.shape[-1] * logits.logsumexp(-1) - logits.gather(-1, targets).sum(-1)


class SMoPEPool(PromptPool, GatheredStatistics):
    """The pool.

    For each head, an image counts once per task for each of its K best experts, without penalty, as selected in the newest
    complete pass over the task's images. The released code counts in an extra pass at the end of the task.

    Tensors: `expert_keys` and `expert_values` [layers, E, D], of which each head uses a slice of D; `history.counts`
    [tasks, layers, H, E]; `old_keys` [layers, E, D], only with a prototype loss.
    """

    roles: ClassVar[dict[str, str]] = {"expert_keys": "prompts", "expert_values": "prompts"}
    old_keys: Tensor
    again: Tensor

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        size = (len(config.layers), config.pool_size, shape.width)
        self.expert_keys = initial(config.prompt_init, *size)
        self.expert_values = initial(config.prompt_init, *size)
        self.history = ActivationHistory((len(config.layers), shape.num_heads), config.pool_size)
        if config.prototype_weight:
            self.register_buffer("old_keys", torch.zeros(*size))
        # Counts of images that this task has shown before, until they make up a complete pass.
        self.register_buffer("again", torch.zeros_like(self.history.counts.sum(0)), persistent=False)

    @property
    def needs_query(self) -> bool:
        """False: one pass is enough."""
        return False

    @property
    def layers(self) -> Sequence[int]:
        """The config's `layers`."""
        return tuple(self.config.layers)

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add a row of counts and keep a copy of the keys."""
        super().begin_task(class_indices)
        self.history.begin_task()
        self.again.zero_()
        if self.config.prototype_weight:
            self.old_keys = self.expert_keys.detach().clone()

    def forward(self, batch: PoolInput) -> Prompts:
        """One router per layer."""
        config, training = self.config, batch.task is not None
        if not training:
            self.check_gathered()
        frequent = self.frequently_used()
        penalty = config.epsilon * frequent if training else EXCLUDED * (self.history.counts.sum(0) == 0)
        keys, values = self._by_head(self.expert_keys), self._by_head(self.expert_values)
        weight = config.router_weight if training else 0.0
        prefixes: dict[int, Prefix] = {
            layer: ExpertRouter(keys[row], values[row], penalty[row], config.top_k, config.epsilon, weight)
            for row, layer in enumerate(self.layers)
        }
        answer = Prompts(prefixes=prefixes)
        if batch.task and config.prototype_weight:
            value = prototype_loss(keys, self._by_head(self.old_keys), frequent, config.top_k)
            answer.losses["prototype"] = LossPart(config.prototype_weight * value, "batch")
        return answer

    def frequently_used(self) -> Tensor:
        """Experts used at least as often as the mean of the used ones, at the end of any earlier task [layers, H, E]."""
        counts = self.history.counts[: max(self.num_tasks - 1, 0)].cumsum(0)
        used = counts > 0
        # count >= sum / number of used experts, in integers
        return (used & (counts * used.sum(-1, keepdim=True) >= counts.sum(-1, keepdim=True))).any(0)

    def prompt_table(self) -> Tensor:
        """Key and value of each expert [layers * H, E, 2, d]."""
        pairs = torch.stack([self._by_head(self.expert_keys), self._by_head(self.expert_values)], 3)
        return pairs.flatten(0, 1)

    def observe(self, seen: Observation) -> None:
        """Count each head's K best experts, without penalty."""
        if seen.scores is None or not self.num_tasks:
            return
        ids = seen.scores.topk(self.config.top_k, dim=-1).indices
        experts = seen.scores.shape[-1]
        new, repeated = (histogram(ids, experts, which) for which in (seen.first_seen, seen.valid & ~seen.first_seen))
        row, again, counted, counted_again = self.waiting or (0, 0, self.history.counts[-1].sum(), self.again.sum())
        # Whether a pass is complete depends on the images of all processes.
        sizes = sum_over_processes(torch.stack([new.sum(), repeated.sum()]))
        row, again, counted, counted_again = row + new, again + repeated, counted + sizes[0], counted_again + sizes[1]
        complete = counted_again >= counted
        self.history.counts[-1] = torch.where(complete, self.again, self.history.counts[-1])
        self.again.copy_(torch.where(complete, 0, self.again))
        passes = ((row, again), (counted, counted_again))
        self.waiting = tuple(
            part for old, newer in passes for part in (torch.where(complete, newer, old), torch.where(complete, 0, newer))
        )
        if world_size() == 1:
            self.gather()

    def gather(self) -> None:
        """See `GatheredStatistics`."""
        if self.waiting:
            row, again = (sum_over_processes(own) for own in self.waiting[:2])
            self.waiting = ()
            self.history.counts[-1] += row
            self.again += again

    def _by_head(self, rows: Tensor) -> Tensor:
        """Rows [layers, E, D] as [layers, H, E, d]."""
        return rows.unflatten(2, (self.shape.num_heads, -1)).transpose(1, 2)


def prototype_loss(keys: Tensor, old_keys: Tensor, frequent: Tensor, k: int) -> Tensor:
    """Cross entropy of the selection by old keys, summed over ranks, heads and layers, mean over frequent experts.

    Args:
        keys: [layers, H, E, d], with gradient.
        old_keys: keys at the end of the previous task, same shape.
        frequent: experts whose old keys are used in place of images [layers, H, E].
        k: number of selected experts.
    """
    targets = (old_keys @ old_keys.mT).topk(k, dim=-1).indices
    each = cross_entropies(old_keys @ keys.mT, targets)
    return ((each * frequent).sum(-1) / frequent.sum(-1).clamp_min(1)).sum()
