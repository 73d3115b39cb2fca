"""VQ-Prompt: Vector Quantization Prompting for Continual Learning (Jiao et al., NeurIPS 2024).

Each prefix layer has a pool of M prompts P_m [Lp, D] with keys k_m [D]. For an image with query q (un-prompted feature, not
normalized):

    alpha = softmax(q . k_m / |k_m| / tau)
    soft  = sum_m alpha_m P_m
    hard  = the P_m with the smallest squared distance to soft
    prefix = value of hard, gradient of soft (straight through): keys and all mixed prompts learn from the cross entropy
    loss  = CE + sum over layers (0.4 mse(soft, hard as constant) + 0.1 mse(hard, soft as constant))

The pool is shared by all tasks and nothing is frozen.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_prompts.interfaces import LossPart, PoolInput, Prefix, PrefixKV, Prompts
from cl_prompts.methods.shared.keyed_layers import KeyedLayers
from cl_prompts.methods.shared.prefixes import split_prefix
from cl_prompts.methods.shared.selection import normalized


class VQPromptPool(KeyedLayers):
    """The pool. Tensors: `prompts` [layers, M, Lp, D], `keys` [layers, M, D], `history.counts` [tasks, layers, M]."""

    def forward(self, batch: PoolInput) -> Prompts:
        """Each layer's mixture, quantized to the nearest prompt."""
        query = batch.query
        assert query is not None
        prefixes: dict[int, Prefix] = {layer: self._layer(row, query, batch) for row, layer in enumerate(self.layers)}
        return Prompts(prefixes=prefixes)

    def _layer(self, row: int, query: Tensor, batch: PoolInput) -> PrefixKV:
        config, prompts = self.config, self.prompts[row].flatten(1)
        scores = query @ normalized(self.keys[row]).T
        alpha = (scores / config.temperature).softmax(1)
        soft = alpha @ prompts
        ids = nearest_prompt(soft.detach(), prompts.detach())[:, None]
        hard = F.embedding(ids[:, 0], prompts)
        rows = hard.detach() + (soft - soft.detach())
        prefix = split_prefix(rows.unflatten(1, self.prompts.shape[2:]), self.heads)
        losses = {}
        if batch.task is not None:
            to_hard = (soft - hard.detach()).square().mean(1)
            to_soft = (hard - soft.detach()).square().mean(1)
            value = config.soft_to_hard_weight * to_hard + config.hard_to_soft_weight * to_soft
            losses["quantization"] = LossPart(value, "mean")
        return replace(prefix, ids=ids, weights=alpha.detach().gather(1, ids), scores=scores, losses=losses)


def nearest_prompt(mixtures: Tensor, prompts: Tensor) -> Tensor:
    """Index of the prompt [M, n] nearest to each mixture [B, n]: [B]; of equal distances the lowest index.

    Squared differences are summed directly, without a tensor [B, M, n]. |a|^2 - 2ab + |b|^2 would lose the small distances
    between similar prompts, and rounding could separate equal ones.
    """
    return torch.cdist(mixtures, prompts, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
