"""L2P with key/value prefixes, "L2P++" of CODA-Prompt's tables (Smith et al., CVPR 2023).

Each prefix layer has its own pool of M prompts [Lp, D] and keys. The rows of the K nearest prompts are concatenated in
front of the block's keys (first half of each prompt) and values (second half), or with `as_tokens` (ours) enter the block
as tokens. The classifier reads the CLS token.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import LossPart, PoolInput, PrefixKV, Prompts
from cl_prompts.methods.shared.keyed_layers import KeyedLayers
from cl_prompts.methods.shared.prefixes import split_prefix
from cl_prompts.methods.shared.queried import QueriedPool
from cl_prompts.methods.shared.selection import CHUNK, cosine_of, cosine_scores, histogram, nearest, top_k
from cl_prompts.runtime.distributed import sum_over_processes


class L2PPrefixPool(KeyedLayers, QueriedPool):
    """The pool. Tensors: `prompts` [layers, M, Lp, D], `keys` [layers, M, D], `history.counts` [tasks, layers, M]."""

    def score(self, row: int, query: Tensor) -> Tensor:
        """Cosines with a layer's keys [B, M]."""
        return cosine_scores(query, self.keys[row])

    def forward(self, batch: PoolInput) -> Prompts:
        """Each layer's K nearest prompts."""

        def layer(row: int, query: Tensor) -> PrefixKV:
            k, keys = self.config.top_k, self.keys[row]
            if self._scores_all:
                scores = self.score(row, query)
                ids = top_k(scores.detach(), k)
                best = scores.gather(1, ids)
            else:
                scores, ids = None, nearest(query, keys.detach(), k)[0]
                best = cosine_of(query, F.embedding(ids, keys))
            rows = F.embedding(ids, self.prompts[row].flatten(1)).unflatten(2, self.prompts.shape[2:])
            if self.config.as_tokens:  # a block's prompt tokens act on the others by their keys and values only
                rows = rows.flatten(1, 2)
                prefix = PrefixKV(rows, rows, normed=True)
            else:
                prefix = split_prefix(rows, self.heads)
            prefix = replace(prefix, ids=ids, weights=best.detach(), scores=scores)
            if batch.task is not None:
                if self.config.key_loss == "coupled" and scores is not None:
                    prefix.losses["pull"] = self._coupled(scores, ids, batch)
                else:
                    prefix.losses["pull"] = self.pull(best)
            return prefix

        return Prompts(prefixes=self.per_layer(list(self.layers), layer, batch))

    @property
    def _scores_all(self) -> bool:
        """Whether the scores [B, M] of the whole pool are computed at once: for small pools, or if a loss needs them."""
        config = self.config
        needed = config.key_loss == "coupled" or config.entropy_weight or config.query_regularization
        return bool(config.pool_size <= CHUNK or (needed and self.training))

    def _coupled(self, scores: Tensor, ids: Tensor, batch: PoolInput) -> LossPart:
        """The released key loss: every image uses the keys that all images of the batch selected, by their counts."""
        chosen = sum_over_processes(histogram(ids, scores.shape[1], batch.valid))
        return LossPart(self.config.pull_coefficient * (chosen * (1 - scores)).sum(1), "sum")
