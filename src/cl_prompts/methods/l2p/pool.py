"""L2P: Learning to Prompt for Continual Learning (Wang et al., CVPR 2022).

A pool of M prompts P_m [Lp, D] with keys k_m [D]. For an image with query q (CLS feature of the un-prompted pass):

    selected = the K keys with the largest cosine(q, k_m)                                 (eq. 3)
    input    = [CLS, P_selected..., patches]                                              (eq. 2)
    loss     = CE(head(mean of the prompts' outputs)) - lambda * sum_selected cosine(q, k_m)   (eq. 5, mean over images)

The query carries no gradient. Keys learn from the second term of the loss only, prompts from the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prompts
from cl_prompts.methods.l2p.majority_vote import majority_vote
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.selection import CHUNK, cosine_of, cosine_scores, diversified_top_k, nearest, top_k


class L2PPool(PromptPool):
    """The L2P pool. Tensors: `prompts` [M, Lp, D], `keys` [M, D] (learned keys only), `history.counts` [tasks, M]."""

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts", "keys": "keys"}
    keys: nn.Parameter | None

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.prompts = initial(config.prompt_init, config.pool_size, config.prompt_length, shape.width)
        self.keys = initial(config.key_init, config.pool_size, shape.width) if config.key_type == "learned" else None
        self.history = ActivationHistory((), config.pool_size)

    @property
    def needs_query(self) -> bool:
        """True unless every image gets every prompt."""
        return bool(self.config.key_type != "none")

    def forward(self, batch: PoolInput) -> Prompts:
        """Tokens [B, K * Lp, D], the selected prompts, and the key loss."""
        if batch.query is None:
            return self._as_tokens(self.prompts.flatten(0, 1).expand(batch.batch_size, -1, -1))
        keys = self.keys if self.keys is not None else self.prompts.mean(1)
        scores = cosine_scores(batch.query, keys) if self._scores_all(batch) else None
        ids = self._select(scores, keys.detach(), batch)
        cosines = scores.gather(1, ids) if scores is not None else cosine_of(batch.query, F.embedding(ids, keys))
        tokens = F.embedding(ids, self.prompts.flatten(1)).view(ids.shape[0], -1, self.shape.width)
        prompts = self._as_tokens(tokens)
        prompts.ids, prompts.weights, prompts.scores = ids, cosines.detach(), scores
        prompts.losses["pull"] = LossPart(-self.config.pull_coefficient * cosines.sum(1), "mean")
        return prompts

    def _scores_all(self, batch: PoolInput) -> bool:
        """Whether the scores [B, M] of the whole pool are computed at once: for small pools, or if a loss needs them."""
        return bool(self.config.pool_size <= CHUNK or (self.config.entropy_weight and batch.task is not None))

    def _select(self, scores: Tensor | None, keys: Tensor, batch: PoolInput) -> Tensor:
        """Selected prompts [B, K], from `scores` [B, M] or, if None, by a search of `keys` [M, D] in chunks."""
        k, query, frequency = self.config.top_k, batch.query, None
        assert query is not None
        if self.config.diversified_selection and batch.task:  # the first task has no history
            history = self.history.before(batch.task)
            frequency = (history / history.sum().clamp_min(1)).to(query.dtype)
        if scores is None:
            ids = nearest(query, keys, k, frequency=frequency)[0]
        elif frequency is None:
            ids = top_k(scores.detach(), k)
        else:
            ids = diversified_top_k(scores.detach(), frequency, k)
        if self.config.batchwise_selection:
            ids = majority_vote(ids, self.config.pool_size, batch.valid, over_processes=batch.task is not None)
        return ids

    def _as_tokens(self, tokens: Tensor) -> Prompts:
        return Prompts(
            tokens=tokens,
            tokens_after_cls=self.config.position == "after_cls",
            tokens_take_cls_position=self.config.add_cls_position_embedding is not False,
        )

    def prompt_table(self) -> Tensor:
        """[1, M, Lp, D]."""
        return self.prompts[None]

    def key_table(self) -> Tensor | None:
        """[1, M, D]; None without learned keys."""
        return None if self.keys is None else self.keys[None]

    def begin_task(self, class_indices: Sequence[int]) -> None:
        """Add a row of counts."""
        super().begin_task(class_indices)
        self.history.begin_task()

    def observe(self, seen: Observation) -> None:
        """Count the prompts that the images of this task use."""
        if seen.ids is not None and self.num_tasks:
            self.history.add(seen.ids, seen.first_seen)
