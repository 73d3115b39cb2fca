"""Key/value prefixes inside attention, through an attention function registered with transformers.

Every attention gets a copy of its config that names `prefix_attention`; it adds the prefix, if there is one, and calls the
function that the model is set to at that moment. A block's part of the plan travels with the block's keyword arguments, so
that gradient checkpointing keeps it with the block's other inputs and recomputation finds it again, in whichever thread.
The attention's pre-hook takes it out of the keyword arguments, which some families (SigLIP) do not hand on to the attention
function. Blocks whose forward takes no further keyword arguments (DINOv2 before transformers 5.18) find it in a context
variable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from cl_prompts.backbones import windows
from cl_prompts.backbones.plan import CallVariable, PassRecord
from cl_prompts.backbones.structure import eager_attention, fused_projection, head_width, projection_names
from cl_prompts.backbones.tokens import widen_mask, widen_rotary, widened
from cl_prompts.interfaces import AttentionSeen, Prefix, PrefixKV, Probe


ATTENTION = "cl_prompts"
KEYWORD = "cl_prompts_block"


@dataclass(frozen=True)
class BlockPlan:
    """A block's part of a pass.

    Args:
        layer: number of the block.
        prefix: its prefix; None: none.
        block_input: what entered the block [B, N, D].
        inserted: position and number of the prompt tokens in the sequence; None: none.
        all_tokens: all tokens behind the block's norm [B, N, D], for keys and values, where the block itself gets only the
            tokens that are read; None: the block gets all tokens.
        read: how many tokens the block then gets.
        learning: whether gradients must reach the prefix.
        record: the pass's own, which takes the prefix that was used.
        probe: called with the attention of a block that has a prefix; None: not called.
    """

    layer: int
    prefix: Prefix | None
    block_input: Tensor
    inserted: tuple[int, int] | None
    all_tokens: Tensor | None
    read: int
    learning: bool
    record: PassRecord
    probe: Probe = None


@dataclass(frozen=True)
class PlainBlock:
    """A running block that takes no keyword arguments.

    Args:
        part: its part of the pass; None: nothing is done in it.
        outer: the block of this kind inside which this one is called.
    """

    part: BlockPlan | None
    outer: PlainBlock | None


# The part of the block whose attention is running; and the innermost running block that takes no keyword arguments.
BLOCK: CallVariable[BlockPlan] = CallVariable("cl_prompts_block")
PLAIN_BLOCK: CallVariable[PlainBlock] = CallVariable("cl_prompts_plain_block")


def enter_plainly(part: BlockPlan | None) -> None:
    """Begin a block that takes no keyword arguments."""
    PLAIN_BLOCK.set(PlainBlock(part, PLAIN_BLOCK.get()))


def leave_plainly(block: nn.Module, args: Any, output: Any) -> None:
    """Hook behind every block that takes no keyword arguments, also after an error."""
    running = PLAIN_BLOCK.get()
    if running is not None:
        PLAIN_BLOCK.set(running.outer)


def part_of(block: Any, kwargs: dict[str, Any]) -> BlockPlan | None:
    """The part of the pass of a block that is running with the keyword arguments `kwargs`, or whose attention is."""
    if block._cl_block.takes_keywords:
        return kwargs.get(KEYWORD)
    running = PLAIN_BLOCK.get()
    return None if running is None else running.part


def enter_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of every attention: take the block's part out of the arguments and let masks cover prompt tokens."""
    block = part_of(attention._cl_norm[0], kwargs)
    BLOCK.set(block)
    if block is None:
        return None
    kwargs = {name: value for name, value in kwargs.items() if name != KEYWORD}
    if block.inserted:
        tokens = args[0] if args else kwargs["hidden_states"]
        kwargs = widen_rotary(kwargs, *block.inserted, tokens.shape[1])
        return widen_mask(args, kwargs, *block.inserted)
    return args, kwargs


def leave_attention(attention: nn.Module, args: Any, output: Any) -> None:
    """Hook behind every attention, also after an error: let go of the block's part."""
    BLOCK.set(None)


def prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """The model's own attention over [prefix keys; keys] and [prefix values; values]; query [B, H, N, d].

    Raises:
        ValueError: the prefixes are learned and the base recomputes its activations with `use_reentrant=True`.
    """
    implementation = module._cl_shared_config._attn_implementation
    attend = eager_attention(module) if implementation == "eager" else AttentionInterface()[implementation]
    block = BLOCK.get()
    if block is None:
        return attend(module, query, key, value, attention_mask, **kwargs)
    if block.all_tokens is not None:
        key, value = (unfold(x, query.shape[1], block.all_tokens.shape[1]) for x in (key, value))
    beside = block.record.beside.get(block.layer)
    if beside is not None:
        own = windows.projected_tokens(module, beside, windows.number(module, query, block.block_input))
        query, key, value = (torch.cat(pair, 2) for pair in zip(own, (query, key, value), strict=True))
        attention_mask = None if attention_mask is None else widened(attention_mask, 0, beside.shape[1])
    if block.prefix is not None:
        scale = kwargs.get("scaling")
        key, value, attention_mask = joined(module, block, query, key, value, attention_mask, scale)
    answer = attend(module, query, key, value, attention_mask, **kwargs)
    if beside is None:
        return answer
    length = beside.shape[1]
    block.record.beside[block.layer + 1] = windows.behind_block(module, beside, answer[0][:, :length].transpose(1, 2))
    return answer[0][:, length:], answer[1]


def attention_function(attention: Any) -> str | None:
    """Name of the attention function that an attention module is set to; None for one that calls none by name."""
    config = getattr(attention, "_cl_shared_config", None)
    return None if config is None else config._attn_implementation


def joined(
    module: Any,
    block: BlockPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, values and mask with the prefix of a block; queries, keys and values are [B, H, N, d]."""
    prefix, k, v = prefix_of(module, block, query)
    key, value = added_to_cls(key, prefix.cls_k), added_to_cls(value, prefix.cls_v)
    key = torch.cat([k.to(key.dtype), key], dim=2)
    value = torch.cat([v.to(value.dtype), value], dim=2)
    attention_mask = mask_with_prefix(attention_mask, prefix, query, k.shape[2])
    probe(module, block, prefix, query, key, attention_mask, scale)
    return key, value, attention_mask


def probe(
    module: Any,
    block: BlockPlan,
    prefix: PrefixKV,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scale: float | None,
) -> None:
    """Show a block's attention to whoever asked for it; keys [B, H, P + N, d]."""
    if block.probe is not None:
        seen = (block.layer, block.block_input, prefix, query, key, attention_mask)
        block.probe(AttentionSeen(*seen, scale or query.shape[3] ** -0.5, _key_weight(module, block.block_input)))


def prefix_of(module: Any, block: BlockPlan, query: Tensor) -> tuple[PrefixKV, Tensor, Tensor]:
    """A block's prefix, and its keys and values [B, H, P, d], for queries [B, H, N, d]."""
    assert block.prefix is not None
    check_recomputation(block.learning)
    number = windows.number(module, query, block.block_input)
    whole = query if number == 1 else windows.whole(query, number)
    prefix = block.prefix if isinstance(block.prefix, PrefixKV) else block.prefix(block.block_input, whole)
    block.record.prefixes[block.layer] = prefix
    BLOCK.set(None)  # rows of a prefix may pass the projections, which then must not take them for the block's tokens
    k, v = _in_head_space(module, prefix, block.block_input.dtype)
    return (prefix, k, v) if number == 1 else windows.repeated(prefix, k, v, number)


def check_recomputation(learning: bool) -> None:
    """Check, where prompts enter a block, that gradients can reach them.

    Raises:
        ValueError: the prompts are learned and the base recomputes its activations with `use_reentrant=True`.
    """
    if learning and not torch.is_grad_enabled():
        raise ValueError(
            "the base checkpoints its activations with use_reentrant=True, through which prompts get no or wrong "
            'gradients: enable it with {"use_reentrant": False}, the default of transformers'
        )


def fold(x: Tensor, read: int) -> Tensor:
    """Keys or values of all N tokens [B, N, D] as `read` rows [B, read, ...], the shape that the block cuts into heads."""
    return nn.functional.pad(x, (0, 0, 0, -x.shape[1] % read)).unflatten(1, (read, -1)).flatten(2)


def unfold(x: Tensor, heads: int, tokens: int) -> Tensor:
    """The inverse of `fold` behind the cut into heads: [B, more heads, read, d] -> [B, heads, tokens, d]."""
    return x.transpose(1, 2).flatten(1, 2).unflatten(1, (-1, heads))[:, :tokens].transpose(1, 2)


def _in_head_space(module: Any, prefix: PrefixKV, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, P, d]; rows in the input space go through the block's modules in the dtype of its tokens."""
    if prefix.k.dim() == 4:
        return prefix.k, prefix.v
    own = (prefix.k.to(dtype), prefix.v.to(dtype))
    if prefix.normed and not windows.normalizes_behind(module):
        block, name = module._cl_norm
        norm = block.get_submodule(name)
        keys = norm(own[0])
        own = (keys, keys if prefix.v is prefix.k else norm(own[1]))
    width = head_width(module)
    k, v = (x.unflatten(2, (-1, width)).transpose(1, 2) for x in _projected(module, *own))
    return k, v


def _projected(module: Any, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, P, D] behind the key and the value projection."""
    names = projection_names(module)
    if names is not None:
        return getattr(module, names[1])(keys), getattr(module, names[2])(values)
    project = getattr(module, fused_projection(module) or "")
    k, v = project(keys).chunk(3, -1)[1], project(values).chunk(3, -1)[2]
    if project.bias is None and isinstance(getattr(module, "q_bias", None), Tensor):  # BEiT and EVA of timm keep it apart
        k, v = k + module.k_bias, v + module.v_bias
    return k, v


def added_to_cls(rows: Tensor, added: Tensor | None) -> Tensor:
    """Keys or values [B, H, N, d] with `added` [B, H, 1, d] on the first token."""
    return rows if added is None else torch.cat([rows[:, :, :1] + added.to(rows.dtype), rows[:, :, 1:]], dim=2)


def _key_weight(module: Any, tokens: Tensor) -> Tensor:
    """Weight of the key projection, float32 [H, d, D]. That of a quantized or LoRA layer is found by its outputs."""
    names, fused = projection_names(module), fused_projection(module)
    projection = getattr(module, names[1] if names else fused or "")
    if type(projection) is nn.Linear and projection.weight.device == tokens.device:
        weight = projection.weight
    else:
        unit = torch.eye(tokens.shape[2], device=tokens.device, dtype=tokens.dtype)
        weight = (projection(unit).float() - projection(torch.zeros_like(unit)).float()).T
    keys = weight if names else weight.chunk(3)[1]
    return keys.float().unflatten(0, (-1, head_width(module)))


def mask_with_prefix(mask: Tensor | None, prefix: PrefixKV, query: Tensor, length: int) -> Tensor | None:
    """A mask (True or 0.0 where attention is free) that covers the prefix too, with its logit bias."""
    if prefix.logit_bias is None:
        if mask is None:
            return None
        return nn.functional.pad(mask, (length, 0), value=float(mask.dtype == torch.bool))
    bias = prefix.logit_bias.to(query.dtype)
    if mask is None:
        own = bias.new_zeros(()).expand(*bias.shape[:3], query.shape[2])
    elif mask.dtype == torch.bool:
        own = bias.new_zeros(()).expand(mask.shape).masked_fill(~mask, float("-inf"))
    else:
        own = mask.to(bias.dtype)
    return torch.cat([bias, own.expand(*bias.shape[:3], -1)], dim=-1)


AttentionInterface.register(ATTENTION, prefix_attention)
