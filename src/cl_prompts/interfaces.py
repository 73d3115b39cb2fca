"""Input and output types of a prompt pool, shared by pools, backbones and the tuner. Depends on torch only.

Letters in shapes: B images, N tokens of a block, D width, P prompt tokens, H heads, d = D / H head width, k chosen prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


# Label of padding and of images to ignore: they enter no loss and no statistic. The `ignore_index` of torch and
# transformers.
IGNORE_INDEX = -100


class NotCacheableError(Exception):
    """Features cannot be cached, because something that they depend on has no cache key."""


@dataclass(frozen=True)
class BackboneShape:
    """Sizes of a backbone that a pool needs to build its tensors.

    Args:
        width: hidden size D.
        num_layers: number of transformer blocks.
        num_heads: number of attention heads H of a block (key and value heads).
        head_dim: width d of one head.
        has_cls: whether a block's first token is a CLS token.
        windowed: whether attention runs in windows (Swin): a block sees each window by itself.
    """

    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    has_cls: bool = True
    windowed: bool = False


@dataclass(frozen=True)
class LossPart:
    """One term of the loss and how it is reduced over a batch.

    Args:
        value: one number per image [B] for "mean" and "sum"; a scalar for "batch".
        reduction: "mean" or "sum" over the valid images of the global batch, or "batch" for a term that is not a sum over
            images; it is added unchanged.
    """

    value: Tensor
    reduction: Literal["mean", "sum", "batch"]


@dataclass
class PrefixKV:
    """Key/value prefixes of one block, concatenated in front of the block's own keys and values.

    Args:
        k: projected keys [B, H, P, d], or [B, P, D] in the input space, to be projected by the block's key projection.
        v: values, [B, H, P, d] or [B, P, D] as for `k`.
        logit_bias: added to the attention logits of the prefix, [B, H, N, P]; may be -inf.
        normed: apply the norm in front of the block's attention to rows in the input space before they are projected.
        cls_k: added to the projected key of the first token, CLS [B, H, 1, d].
        cls_v: added to its projected value [B, H, 1, d].
        ids: selected prompts [B, k], or [B, H, k] if each head selects; for the output.
        weights: their mixing weights [B, k] or [B, H, k]; for the output.
        scores: selection scores of the whole pool, [B, M] or [B, H, M].
        losses: terms that are added to the cross entropy, by name; terms of the same name are added over the layers.
    """

    k: Tensor
    v: Tensor
    logit_bias: Tensor | None = None
    normed: bool = False
    cls_k: Tensor | None = None
    cls_v: Tensor | None = None
    ids: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    losses: dict[str, LossPart] = field(default_factory=dict)


# A prefix that depends on its block's input is a function (block input [B, N, D], attention queries [B, H, N, d]) ->
# PrefixKV; it is called inside the attention.
Prefix = PrefixKV | Callable[[Tensor, Tensor], PrefixKV]


@dataclass(frozen=True)
class AttentionSeen:
    """A prompted block's attention in the pass over a task's images at its end, for the statistics of a pool.

    Args:
        layer: number of the block.
        block_input: what entered the block [B, N, D].
        prefix: the prefix used, of P rows.
        queries: of the block's tokens, with bias and not scaled [B, H, N, d].
        keys: of the prefix, then of the block's tokens [B, H, P + N, d].
        bias: added to the attention logits, or a mask that is True where attention is free; None, or broadcast to
            [B, H, N, P + N].
        scale: factor of the dot products.
        key_weight: weight of the key projection, by head [H, d, D].
    """

    layer: int
    block_input: Tensor
    prefix: PrefixKV
    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    scale: float
    key_weight: Tensor

    def prefix_attention(self) -> Tensor:
        """Attention weights of the block's tokens on the prefix rows, float32 [B, H, N, P]."""
        logits = self.queries.float() @ self.keys.float().mT * self.scale
        if self.bias is not None and self.bias.dtype == torch.bool:
            logits = logits.masked_fill(~self.bias, float("-inf"))
        elif self.bias is not None:
            logits = logits + self.bias.float()
        return logits.softmax(-1)[..., : self.keys.shape[2] - self.queries.shape[2]]


# Is called with the attention of each block that has a prefix; None: it is not called.
Probe = Callable[[AttentionSeen], None] | None


@dataclass
class PoolInput:
    """Input of a pool's forward. It has no labels, and at test no task.

    Args:
        batch_size: B.
        query: features of the un-prompted pass [B, D], without gradient; None if the pool's `needs_query` is False.
        task: number of the current task (from 0) in training; None at test.
        valid: True for real images, False for padding [B]; None: all are real.
    """

    batch_size: int
    query: Tensor | None = None
    task: int | None = None
    valid: Tensor | None = None


@dataclass
class Prompts:
    """Output of a pool's forward.

    Args:
        tokens: prompt tokens for the input sequence [B, P, D].
        tokens_after_cls: insert them after the CLS token (True) or in front of the sequence (False).
        tokens_take_cls_position: add the position embedding of the CLS token to every prompt token.
        prefixes: key/value prefixes by block number (from 0).
        losses: terms that are added to the cross entropy, by name, with signs and weights applied.
        ids: selected prompts [B, k].
        weights: their scores or mixing weights [B, k].
        scores: selection scores of the whole pool [B, M].
        candidates: number c of prompted passes per image. With c > 1, tokens, prefixes with all their fields, ids and
            weights have c * B rows, those of one image adjacent; `scores` has B.
        combine: how the candidates of an image are combined: "confident" (the output of the most confident candidate) or
            "mean" (log of the mean class probabilities).
    """

    tokens: Tensor | None = None
    tokens_after_cls: bool = True
    tokens_take_cls_position: bool = False
    prefixes: dict[int, Prefix] = field(default_factory=dict)
    losses: dict[str, LossPart] = field(default_factory=dict)
    ids: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    candidates: int = 1
    combine: Literal["confident", "mean"] = "confident"
