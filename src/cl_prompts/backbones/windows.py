"""Prompts where attention runs in windows (Swin, Swin v2), as in visual prompt tuning (Jia et al., ECCV 2022).

A block cuts its tokens into W windows of n tokens; attention gets them as a batch, those of an image adjacent. A prefix
stands in front of the keys and values of every window. Prompt tokens stay beside the sequence: every window has them in
front of its own tokens, and what they become is averaged over the windows. Neither has a position bias, and neither is
masked where windows are shifted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from cl_prompts.backbones.structure import head_width, projection_names
from cl_prompts.interfaces import PrefixKV


def number(attention: Any, query: Tensor, block_input: Tensor) -> int:
    """W, for queries [B W, H, n, d] of an attention and the input of its block [B, N, D]; 1 without windows."""
    if not attention._cl_norm[0]._cl_block.windowed:
        return 1
    return query.shape[0] // max(1, block_input.shape[0])


def whole(query: Tensor, windows: int) -> Tensor:
    """Queries of all windows of an image, one window after the other: [B W, H, n, d] -> [B, H, W n, d]."""
    return query.unflatten(0, (-1, windows)).transpose(1, 2).flatten(2, 3)


def repeated(prefix: PrefixKV, k: Tensor, v: Tensor, windows: int) -> tuple[PrefixKV, Tensor, Tensor]:
    """A prefix for every window: keys and values [B W, H, P, d], and its logit bias by window [B W, H, n, P]."""
    bias = prefix.logit_bias
    if bias is not None:
        bias = bias.unflatten(2, (windows, -1)).transpose(1, 2).flatten(0, 1)
    return replace(prefix, logit_bias=bias), k.repeat_interleave(windows, 0), v.repeat_interleave(windows, 0)


def normalizes_behind(attention: Any) -> bool:
    """Whether a block's norms stand behind attention and MLP, and attention takes cosines (Swin v2)."""
    return hasattr(attention, "logit_scale")


def projected_tokens(attention: Any, tokens: Tensor, windows: int) -> list[Tensor]:
    """Queries, keys and values [B W, H, P, d] of the prompt tokens [B, P, D] that enter a block."""
    block, norm = attention._cl_norm
    rows = tokens if normalizes_behind(attention) else block.get_submodule(norm)(tokens)
    width, names = head_width(attention), projection_names(attention)
    assert names is not None
    heads = (getattr(attention, name)(rows).unflatten(2, (-1, width)).transpose(1, 2) for name in names)
    return [part.repeat_interleave(windows, 0) for part in heads]


def behind_block(attention: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    """The prompt tokens behind a block [B, P, D].

    Args:
        attention: of the block.
        tokens: what entered the block [B, P, D].
        attended: what attention makes of them in each window, before its output projection [B W, H, P, d].
    """
    block = attention._cl_norm[0]
    mean = attended.unflatten(0, (tokens.shape[0], -1)).mean(1).transpose(1, 2).flatten(2)
    output = attention.o_proj if hasattr(attention, "o_proj") else block.attention.output.dense
    if normalizes_behind(attention):
        tokens = tokens + block.layernorm_before(output(mean))
        return tokens + block.layernorm_after(_mlp(block, tokens))
    tokens = tokens + output(mean)
    return tokens + _mlp(block, block.layernorm_after(tokens))


def _mlp(block: Any, tokens: Tensor) -> Tensor:
    done: Tensor = block.mlp(tokens) if hasattr(block, "mlp") else block.output(block.intermediate(tokens))
    return done
