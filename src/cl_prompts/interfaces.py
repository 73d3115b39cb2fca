"""What a pool gives and takes. Torch only: pools, backbones and the tuner all speak in these types.

Letters in shapes: B images, N tokens of a block, D width, P prompt tokens, H heads, d = D / H head width, k chosen prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor


# Label of images that count nowhere: padding, or images to leave out. The `ignore_index` of torch and transformers.
IGNORE_INDEX = -100


class NotCacheableError(Exception):
    """Features cannot be cached, because something that decides them does not say what it does."""


@dataclass(frozen=True)
class BackboneShape:
    """The sizes of a backbone that a pool needs to build its tensors.

    Args:
        width: hidden size D.
        num_layers: number of transformer blocks.
        num_heads: attention heads H of a block (of its keys and values).
        head_dim: width d of one head.
        has_cls: whether a block's first token is a CLS token.
    """

    width: int
    num_layers: int
    num_heads: int
    head_dim: int
    has_cls: bool = True


@dataclass(frozen=True)
class LossPart:
    """A term of the loss and how it adds up over a batch.

    Args:
        value: one number per image [B] for "mean" and "sum"; a scalar for "batch".
        reduction: "mean" is averaged and "sum" is added up over the images of the global batch; "batch" is a term that
            cannot be split by image (or depends on none) and enters as it is.
    """

    value: Tensor
    reduction: Literal["mean", "sum", "batch"]


@dataclass
class PrefixKV:
    """Key/value prefixes of one block: they are put in front of the block's own keys and values.

    Args:
        k: keys [B, H, P, d], behind the projections; or [B, P, D], to go through the block's own key projection.
        v: values, likewise [B, H, P, d] or [B, P, D].
        logit_bias: added to the attention logits towards the prefix, [B, H, N, P]; may be -inf.
        normed: rows in the input space pass the norm in front of the block's attention first, as the block's tokens do.
        ids: chosen prompts [B, k] (or [B, H, k] where each head chooses), for the output.
        weights: their mixing weights, likewise [B, k] or [B, H, k], for the output.
        scores: what the choice was made by, over the whole pool, [B, M] (or [B, H, M]).
        losses: terms that join the cross entropy; those of one name are added up over the layers.
    """

    k: Tensor
    v: Tensor
    logit_bias: Tensor | None = None
    normed: bool = False
    ids: Tensor | None = None
    weights: Tensor | None = None
    scores: Tensor | None = None
    losses: dict[str, LossPart] = field(default_factory=dict)


# A prefix that depends on what enters its block is a function of that block's input [B, N, D] and its attention queries
# [B, H, N, d]; it is called inside the attention.
Prefix = PrefixKV | Callable[[Tensor, Tensor], PrefixKV]


@dataclass
class PoolInput:
    """What a pool may know of a batch. At test `task` is None: nobody tells which task an image belongs to.

    Args:
        batch_size: B.
        query: features of the un-prompted pass [B, D], without gradient; None if the pool did not ask for it.
        task: number of the current task (from 0) in training, None at test.
        counted: True where an image is a real one, [B]; False for padding that fills a batch up. None: all are real.
    """

    batch_size: int
    query: Tensor | None = None
    task: int | None = None
    counted: Tensor | None = None


@dataclass
class Prompts:
    """What a pool answers.

    Args:
        tokens: prompt tokens for the input sequence [B, P, D].
        tokens_after_cls: put them behind the CLS token (True) or in front of the sequence (False).
        tokens_take_cls_position: add the CLS token's position embedding to every prompt token.
        prefixes: key/value prefixes by block number (from 0).
        losses: terms that join the cross entropy, by name, signs and weights already in.
        ids: chosen prompts [B, k].
        weights: their scores or mixing weights [B, k].
        scores: what the choice was made by, over the whole pool, [B, M].
        candidates: c > 1 asks for c prompted passes per image; tokens, prefixes, ids and weights then have c * B rows, the
            candidates of one image next to each other.
        combine: how candidates answer together: "confident" (the most confident one answers for its image) or "mean" (the
            mean of their class probabilities, as log probabilities).
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
