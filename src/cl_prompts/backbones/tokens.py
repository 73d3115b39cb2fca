"""Prompt tokens in the sequence: inserted in front of block 0, taken out behind the last block, allowed by masks.

What leaves the last block has its original length, so every head and pooler of the model works unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_prompts.backbones.plan import PassPlan


def insert_tokens(hidden: Tensor, plan: PassPlan, windowed: bool) -> Tensor:
    """The sequence [B, N, D] with the plan's prompt tokens in it: [B, N + P, D]. With windows they stay beside it.

    Raises:
        TypeError: what enters block 0 is no sequence but, for example, a map [B, H, W, D] that is cut into windows.
    """
    if plan.tokens is None:
        return hidden
    if hidden.dim() != 3:
        raise TypeError(f"what enters its blocks has {hidden.dim()} dimensions, not the 3 of a sequence of tokens")
    tokens = plan.tokens.to(hidden.dtype)
    if windowed:
        plan.record.beside[0] = tokens
        return hidden
    return torch.cat([hidden[:, : plan.token_index], tokens, hidden[:, plan.token_index :]], dim=1)


def record_output(output: Any, plan: PassPlan, length: int) -> Any:
    """Record what leaves the last block, and take the prompt tokens out of it.

    Args:
        output: of the block, a tensor or a tuple that begins with one.
        plan: of the pass.
        length: number of tokens N that the model expects behind the last block.

    Returns:
        The output with a sequence of N tokens.
    """
    record = plan.record
    hidden = output[0] if isinstance(output, tuple) else output
    if record.narrowed:
        record.hidden = record.prompt_hidden = hidden
        # The model's own head and pooler read tokens that were not computed. Nobody reads their answers.
        hidden = hidden[:, :1].expand(-1, length, -1)
    elif plan.tokens is None or record.beside:
        record.hidden = hidden
        record.prompt_hidden = record.beside[max(record.beside)] if record.beside else None
        return output
    else:
        start, stop = plan.token_index, plan.token_index + plan.tokens.shape[1]
        record.prompt_hidden = hidden[:, start:stop]
        hidden = record.hidden = torch.cat([hidden[:, :start], hidden[:, stop:]], dim=1)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def widen_mask(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: int, length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an attention whose mask or bias lets every token see the prompts and the prompts every token."""
    if len(args) > 1 and isinstance(args[1], Tensor):
        args = (args[0], widened(args[1], index, length), *args[2:])
    elif isinstance(kwargs.get("attention_mask"), Tensor):
        kwargs = {**kwargs, "attention_mask": widened(kwargs["attention_mask"], index, length)}
    return args, kwargs


def widen_rotary(kwargs: dict[str, Any], index: int, length: int, tokens: int) -> dict[str, Any]:
    """Keyword arguments of an attention whose rotary embeddings leave prompt tokens as they are.

    A table has a row for each of the last tokens, often for patches only. transformers passes cosines and sines in a tuple
    `position_embeddings`, timm sines beside cosines in a tensor `rope`.

    Args:
        kwargs: the arguments.
        index, length: position and number of the prompt tokens in the sequence.
        tokens: number of all tokens in the sequence.
    """
    tables = kwargs.get("position_embeddings")
    if isinstance(tables, (tuple, list)) and len(tables) == 2 and tables[0].shape[-2] == tokens - length:
        cosine, sine = (_with_rows(t, index, length, value) for t, value in zip(tables, (1.0, 0.0), strict=True))
        return {**kwargs, "position_embeddings": (cosine, sine)}
    rope = kwargs.get("rope")
    if isinstance(rope, Tensor):
        start = max(0, index + length + rope.shape[-2] - tokens)
        sine, cosine = rope.chunk(2, -1)
        sine, cosine = _with_rows(sine, start, length, 0.0), _with_rows(cosine, start, length, 1.0)
        return {**kwargs, "rope": torch.cat([sine, cosine], -1)}
    return kwargs


def _with_rows(table: Tensor, index: int, length: int, value: float) -> Tensor:
    """A table [..., N, d] with `length` rows of one value in it."""
    rows = table.new_full((*table.shape[:-2], length, table.shape[-1]), value)
    return torch.cat([table[..., :index, :], rows, table[..., index:, :]], dim=-2)


def widened(mask: Tensor, index: int, length: int) -> Tensor:
    """A mask or bias [..., N, N] over tokens with prompt tokens among them: zero or True there."""
    for dim in (-1, -2):
        if mask.shape[dim] > 1:  # a size of 1 is broadcast over the queries
            size = list(mask.shape)
            size[dim] = length
            free = torch.full(size, mask.dtype == torch.bool, dtype=mask.dtype, device=mask.device)
            before, behind = mask.tensor_split([index], dim=dim)
            mask = torch.cat([before, free, behind], dim=dim)
    return mask
