"""Rows of prompts as key/value prefixes, and the query that a layer makes by itself. Shared by the methods.

Letters in shapes: B images, N tokens, D width, H heads, d head width, P prefix rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cl_prompts.interfaces import PrefixKV


def prefix_of(keys: Tensor, values: Tensor, heads: int | None) -> PrefixKV:
    """A prefix of `keys` [B, P, D] and `values` [B, P, D], cut into `heads`, [B, H, P, d]; None: in the input space."""
    if heads is None:
        return PrefixKV(keys, values)
    return PrefixKV(*(rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (keys, values)))


def split_prefix(rows: Tensor, heads: int | None) -> PrefixKV:
    """A prefix of prompts, `rows` [B, Lp, D] or [B, k, Lp, D]: the first half of each prompt are keys, the second values.

    `heads` as in `prefix_of`.
    """
    keys, values = (half.flatten(1, -2) for half in rows.chunk(2, dim=-2))
    return prefix_of(keys, values, heads)


class LayerQuery:
    """A prefix whose query is what enters its layer (OS-Prompt): the CLS token, or the tokens' mean without one.

    Args:
        answer: query [B, D] -> the layer's prefix.
        has_cls: whether token 0 is a CLS token.
    """

    def __init__(self, answer: Callable[[Tensor], PrefixKV], has_cls: bool) -> None:
        self.answer = answer
        self.has_cls = has_cls

    def __call__(self, block_input: Tensor, queries: Tensor) -> PrefixKV:
        """The prefix for a block input [B, N, D]; it carries no gradient to the layers below."""
        with torch.autocast(block_input.device.type, enabled=False):
            tokens = block_input.detach().float()
            return self.answer(tokens[:, 0] if self.has_cls else tokens.mean(1))
