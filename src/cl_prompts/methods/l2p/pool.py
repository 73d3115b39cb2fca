"""L2P: Learning to Prompt for Continual Learning (Wang et al., CVPR 2022).

A pool of M prompts P_m [Lp, D] with keys k_m [D]. For an image with query q (CLS feature of the un-prompted pass):

    selected = the K keys with the largest cosine(q, k_m)                                 (eq. 3)
    input    = [CLS, P_selected..., patches]                                              (eq. 2)
    loss     = CE(head(mean of the prompts' outputs)) - lambda * sum_selected cosine(q, k_m)   (eq. 5, mean over images)

The query carries no gradient. Keys learn from the second term of the loss only, prompts from the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_prompts.interfaces import BackboneShape, PoolInput, Prompts
from cl_prompts.methods.l2p.choice import by_pass, choose, passes, pull, tokens_of
from cl_prompts.methods.l2p.growth import grow
from cl_prompts.methods.pool import Observation, PromptPool
from cl_prompts.methods.shared.history import ActivationHistory
from cl_prompts.methods.shared.initialization import initial
from cl_prompts.methods.shared.selection import CHUNK, cosine_of, cosine_scores


class L2PPool(PromptPool):
    """The L2P pool. Tensors: `prompts` [M, Lp, D], `keys` [M, W] (learned keys only), `history.counts` [tasks, M].

    M counts the prompts of all pools. With `key_width` W there is `query_projection` [D, W]; without it W = D.
    """

    roles: ClassVar[dict[str, str]] = {"prompts": "prompts", "keys": "keys", "query_projection": "keys"}
    keys: nn.Parameter | None

    def __init__(self, config: Any, shape: BackboneShape) -> None:
        super().__init__(config, shape)
        size, width = config.num_pools * config.pool_size, config.key_width or shape.width
        self.prompts = initial(config.prompt_init, size, config.prompt_length, shape.width)
        self.keys = initial(config.key_init, size, width) if config.key_type == "learned" else None
        if config.key_width:  # keeps the length of queries on average
            self.query_projection = nn.Parameter(torch.randn(shape.width, width) / math.sqrt(width))
        self.history = ActivationHistory((), size)

    @property
    def needs_query(self) -> bool:
        """True unless every image gets every prompt."""
        return bool(self.config.key_type != "none")

    def forward(self, batch: PoolInput) -> Prompts:
        """Tokens [B, K * Lp, D], the selected prompts, and the key loss."""
        if batch.query is None:
            return self._as_tokens(self.prompts.flatten(0, 1).expand(batch.batch_size, -1, -1))
        config, keys = self.config, self.keys if self.keys is not None else self.prompts.mean(1)
        query = batch.query @ self.query_projection if config.key_width else batch.query
        # The scores [B, M] of the whole pool are computed at once for small pools, or if a loss needs them.
        at_once = len(keys) <= CHUNK or (config.entropy_weight and batch.task is not None)
        scores = cosine_scores(query, keys) if at_once else None
        chosen = choose(config, batch, query, keys.detach(), scores, self.history)
        ids = chosen.flatten(1)
        cosines = scores.gather(1, ids) if scores is not None else cosine_of(query, F.embedding(ids, keys))
        prompts = self._as_tokens(tokens_of(config, chosen, self.prompts))
        prompts.ids, prompts.scores = by_pass(config, chosen), scores
        prompts.weights = by_pass(config, cosines.detach().view_as(chosen))
        prompts.candidates, prompts.combine = passes(config, chosen), "mean"
        prompts.losses["pull"] = pull(config, query, keys, ids, cosines)
        return prompts

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
        """Add a row of counts and, after the first task, the prompts of `grow_by`."""
        grow(self, int(self.num_tasks > 0))
        super().begin_task(class_indices)
        self.history.begin_task()

    def make_room(self, tasks: Sequence[Sequence[int]]) -> None:
        """See `PromptPool`."""
        grow(self, len(tasks))
        super().make_room(tasks)

    def observe(self, seen: Observation) -> None:
        """Count the prompts that the images of this task use."""
        if seen.ids is not None and self.num_tasks:
            self.history.add(seen.ids, seen.first_seen)
