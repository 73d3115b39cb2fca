"""Prefixes selected by a query: the un-prompted feature (two passes), or each layer's own CLS token (one stage)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from cl_prompts.interfaces import LossPart, PoolInput, Prefix, PrefixKV
from cl_prompts.methods.pool import PromptPool
from cl_prompts.methods.shared.prefixes import LayerQuery


class QueriedPool(PromptPool):
    """Base of methods whose config is a `QueriedPrefixConfig`.

    One stage (Kim et al., "One-stage Prompt-based Continual Learning", ECCV 2024, OS-Prompt): each layer's query q_l is the
    CLS token of its input. OS-Prompt++ adds, in training, lambda * |softmax(scores of q_l) - softmax(scores of r)|^2 per
    layer and image, for the un-prompted feature r.
    """

    @property
    def needs_query(self) -> bool:
        """True for two-stage queries. One-stage queries need it only in training, for their regularization."""
        if not self.config.one_stage:
            return True
        return self.training and self.config.query_regularization > 0

    @abstractmethod
    def score(self, row: int, query: Tensor) -> Tensor:
        """Selection scores of the pool's layer number `row` for each `query` [B, D]: [B, M]."""

    def per_layer(
        self, layers: list[int], answer: Callable[[int, Tensor], PrefixKV], batch: PoolInput
    ) -> dict[int, Prefix]:
        """Each layer's prefix; for one-stage queries, the function that makes it inside the layer.

        Args:
            layers: block numbers.
            answer: function (row in `layers`, query [B, D]) -> prefix.
            batch: input of the pool.
        """
        if not self.config.one_stage:
            assert batch.query is not None
            return {layer: answer(row, batch.query) for row, layer in enumerate(layers)}

        def inside(row: int) -> Prefix:
            def of_query(query: Tensor) -> PrefixKV:
                prefix = answer(row, query)
                if batch.query is None or batch.task is None or not self.config.query_regularization:
                    return prefix
                apart = self.score(row, query).softmax(1) - self.score(row, batch.query).softmax(1)
                value = self.config.query_regularization * apart.square().sum(1)
                return replace(prefix, losses={**prefix.losses, "query": LossPart(value, "mean")})

            return LayerQuery(of_query, self.shape.has_cls and self.config.layer_query == "cls")

        return {layer: inside(row) for row, layer in enumerate(layers)}

    def pull(self, chosen_scores: Tensor) -> LossPart:
        """The key loss, from the cosines of the selected keys, `chosen_scores` [B, k].

        With `key_loss` "similarity": -lambda * sum of the cosines, mean over images (L2P eq. 5). With "distance": lambda *
        sum of 1 - cosine, summed over the batch (CODA-Prompt's repository).
        """
        weight = self.config.pull_coefficient
        if self.config.key_loss == "similarity":
            return LossPart(-weight * chosen_scores.sum(1), "mean")
        return LossPart(weight * (1 - chosen_scores).sum(1), "sum")
