"""L2P: Learning to Prompt for Continual Learning (Wang et al., CVPR 2022).

A pool of M prompts P_m [Lp, D] with keys k_m [D]. For an image with query q (un-prompted CLS feature):

    chosen  = the K keys with the largest cosine(q, k_m)                              (eq. 3)
    input   = [CLS, P_chosen..., patches]                                             (eq. 2)
    loss    = CE(head(mean of the prompts' outputs)) - lambda * sum_chosen cosine(q, k_m)   (eq. 5, mean over images)

The query carries no gradient; keys learn from the second term alone, prompts from the first.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, LossPart, PoolInput, Prompts
from cl_prompts.methods.l2p.faiss_search import faiss_nearest, load_faiss
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.initialisation import initial
from cl_prompts.methods.shared.selection import (
    CHUNK,
    cosine_of,
    cosine_scores,
    diversified_top_k,
    majority_vote,
    nearest,
    top_k,
)


class L2PPool(PromptPool, method="l2p"):
    """The L2P pool. Tensors: `prompts` [M, Lp, D], `keys` [M, D] (learned keys only), `history.counts` [tasks, M]."""

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts", "keys": "keys"}
    keys: nn.Parameter | None

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        self.prompts = initial(config.prompt_init, config.pool_size, config.prompt_length, shape.width)
        self.keys = initial(config.key_init, config.pool_size, shape.width) if config.key_type == "learned" else None
        self.history = ActivationHistory((), config.pool_size)
        if config.search == "faiss":
            load_faiss()  # so that its absence is known here and not at the first image

    @property
    def needs_query(self) -> bool:
        """Without keys there is nothing to ask."""
        return bool(self.config.key_type != "none")

    def begin_task(self, columns: Any) -> None:
        """Open a row of counts."""
        super().begin_task(columns)
        self.history.begin_task()

    def forward(self, batch: PoolInput) -> Prompts:
        """Tokens [B, K * Lp, D], the pull loss, and what was chosen."""
        if batch.query is None:
            return self._prompts(self.prompts.flatten(0, 1).expand(batch.batch_size, -1, -1))
        keys = self.keys if self.keys is not None else self.prompts.mean(1)
        scores = cosine_scores(batch.query, keys) if self._scores_all(batch) else None
        ids = self._choose(scores, keys.detach(), batch)
        chosen_scores = scores.gather(1, ids) if scores is not None else cosine_of(batch.query, F.embedding(ids, keys))
        tokens = F.embedding(ids, self.prompts.flatten(1)).view(len(ids), -1, self.shape.width)
        prompts = self._prompts(tokens)
        prompts.ids, prompts.weights, prompts.scores = ids, chosen_scores.detach(), scores
        prompts.losses["pull"] = LossPart(-self.config.pull_coefficient * chosen_scores.sum(1), "mean")
        return prompts

    def prompt_table(self) -> Tensor:
        """[1, M, Lp, D]."""
        return self.prompts[None]

    def key_table(self) -> Tensor | None:
        """[1, M, D], learned keys only."""
        return None if self.keys is None else self.keys[None]

    def observe(self, seen: Observation) -> None:
        """Count which prompts the images of this task use."""
        if seen.ids is not None and self.num_tasks:
            self.history.add(seen.ids, seen.counted)

    def _scores_all(self, batch: PoolInput) -> bool:
        """Whether every image is compared with every key at once; a large pool's [B, M] only if a loss needs it."""
        config = self.config
        few = config.pool_size <= CHUNK and config.search == "torch"
        return bool(few or (config.entropy_weight and batch.task is not None))

    def _choose(self, scores: Tensor | None, keys: Tensor, batch: PoolInput) -> Tensor:
        k, query, frequency = self.config.top_k, batch.query, None
        assert query is not None
        if self.config.diversified_selection and batch.task:  # the first task has no history
            history = self.history.before(batch.task)
            frequency = (history / history.sum().clamp_min(1)).to(query.dtype)
        if scores is None and self.config.search == "faiss":
            ids = faiss_nearest(query, keys, k)
        elif scores is None:
            ids = nearest(query, keys, k, frequency=frequency)[0]
        elif frequency is None:
            ids = top_k(scores.detach(), k)
        else:
            ids = diversified_top_k(scores.detach(), frequency, k)
        if self.config.batchwise_selection:
            training = batch.task is not None
            ids = majority_vote(ids, self.config.pool_size, batch.counted, over_processes=training)
        return ids

    def _prompts(self, tokens: Tensor) -> Prompts:
        return Prompts(
            tokens=tokens,
            tokens_after_cls=self.config.position == "after_cls",
            tokens_take_cls_position=self.config.add_cls_position_embedding is not False,
        )
