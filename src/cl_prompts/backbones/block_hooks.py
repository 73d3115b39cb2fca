"""The hooks on blocks: prompt tokens and prefixes go in, the last block's output is recorded.

Hooks are plain functions that read the plan of the pass they run in. What they know of their block stands on the block, so
that copies of a module (PEFT's `modules_to_save`) keep it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cl_prompts.backbones import last_block
from cl_prompts.backbones.block_info import BlockInfo
from cl_prompts.backbones.plan import running_plan
from cl_prompts.backbones.prefix import (
    KEYWORD,
    BlockPlan,
    check_recomputation,
    enter_attention,
    enter_plainly,
    leave_attention,
    leave_plainly,
    part_of,
)
from cl_prompts.backbones.structure import Structure
from cl_prompts.backbones.tokens import insert_tokens, record_output


def install(model: nn.Module, structure: Structure) -> list[Any]:
    """Put the hooks on blocks, attentions and pooler; returns their handles."""
    blocks: list[Any] = [model.get_submodule(name) for name in structure.blocks]
    attentions = [model.get_submodule(name) for name in structure.attentions]
    handles: list[Any] = [
        *(block.register_forward_pre_hook(enter_block, with_kwargs=True) for block in blocks),
        blocks[-1].register_forward_hook(leave_last_block, with_kwargs=True),
        *(b.register_forward_hook(leave_plainly, always_call=True) for b in blocks if not b._cl_block.takes_keywords),
        *(attention.register_forward_pre_hook(enter_attention, with_kwargs=True) for attention in attentions),
        *(attention.register_forward_hook(leave_attention, always_call=True) for attention in attentions),
        *last_block.install(attentions[-1]),
    ]
    if structure.pooler:
        handles.append(model.get_submodule(structure.pooler).register_forward_hook(record_pooled))
    return handles


def enter_block(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pre-hook of every block: tokens, the last block's narrowing, and the block's part of the plan among its arguments."""
    plan = running_plan()
    if plan is None:
        return None
    info: BlockInfo = block._cl_block
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    if info.layer == 0:
        if plan.keep_block_input:
            plan.record.block_input = hidden
        if plan.tokens is not None:
            check_recomputation(plan.learning)
        hidden = insert_tokens(hidden, plan, info.windowed)
    all_tokens, block_input = None, hidden
    if info.last and last_block.may_narrow(block, plan, info.layer, args, kwargs):
        assert plan.read is not None
        all_tokens = block.get_submodule(info.norm)(hidden)
        hidden = hidden[:, plan.read[0] : plan.read[0] + plan.read[1]]
        plan.record.narrowed = True
    prefix = plan.prefixes.get(info.layer)
    inserted = None if plan.tokens is None or info.windowed else (plan.token_index, plan.tokens.shape[1])
    part = None
    if prefix is not None or plan.tokens is not None or all_tokens is not None:
        part = BlockPlan(
            layer=info.layer,
            prefix=prefix,
            block_input=block_input,
            inserted=inserted,
            all_tokens=all_tokens,
            read=plan.read[1] if plan.read is not None else 0,
            learning=plan.learning,
            record=plan.record,
            probe=plan.probe,
        )
    if not info.takes_keywords:
        enter_plainly(part)
    elif part is not None:
        kwargs = {**kwargs, KEYWORD: part}
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def leave_last_block(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Hook behind the last block: record its output, and take the prompt tokens out of it."""
    plan = running_plan()
    if plan is None:
        return None
    part = part_of(block, kwargs)
    length = 0 if part is None else part.block_input.shape[1] - (0 if part.inserted is None else part.inserted[1])
    return record_output(output, plan, length)


def record_pooled(pooler: nn.Module, args: Any, output: Tensor) -> None:
    """Hook behind the model's own pooler: record its feature."""
    plan = running_plan()
    if plan is not None:
        plan.record.pooled = output
