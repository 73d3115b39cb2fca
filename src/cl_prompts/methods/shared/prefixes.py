"""Key/value prefixes made of prompt rows, and queries taken from a layer's input.

Letters in shapes: B images, N tokens, D width, H heads, d head width, P prefix rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cl_prompts.interfaces import PrefixKV


def prefix_of(keys: Tensor, values: Tensor, heads: int | None) -> PrefixKV:
    """A prefix of `keys` and `values` [B, P, D], split into `heads`: [B, H, P, d]. With heads=None in the input space."""
    if heads is None:
        return PrefixKV(keys, values)
    return PrefixKV(*(rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (keys, values)))


def split_prefix(rows: Tensor, heads: int | None) -> PrefixKV:
    """A prefix of prompts, `rows` [B, Lp, D] or [B, k, Lp, D]: the first half of each prompt is keys, the second is values.

    `heads` is as in `prefix_of`.
    """
    keys, values = (half.flatten(1, -2) for half in rows.chunk(2, dim=-2))
    return prefix_of(keys, values, heads)


class LayerQuery:
    """A prefix whose query is the CLS token of its layer's input (OS-Prompt), or the mean of its tokens.

    Args:
        answer: function query [B, D] -> the layer's prefix.
        by_cls: whether the query is token 0, a CLS token.
    """

    def __init__(self, answer: Callable[[Tensor], PrefixKV], by_cls: bool) -> None:
        self.answer = answer
        self.by_cls = by_cls

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix for a block input [B, N, D]. No gradient flows to the layers below."""
        with torch.autocast(block_input.device.type, enabled=False):
            tokens = block_input.detach().float()
            return self.answer(tokens[:, 0] if self.by_cls else tokens.mean(1))
