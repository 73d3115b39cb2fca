"""The last block computes only the tokens that are read, which saves up to a twelfth of a ViT's work.

Keys and values need all tokens; queries, output projection and MLP only those that are read. So the block gets these as its
whole input, and its key and value projections get all tokens, behind the block's norm. A block runs as it is where it takes
more than its tokens (rotary embeddings, position biases, masks), or where a trial on random tokens does not give the plain
block's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cl_prompts.backbones.frozen_tensors import execution_device
from cl_prompts.backbones.plan import PassPlan, PassRecord
from cl_prompts.backbones.prefix import BLOCK, fold
from cl_prompts.backbones.structure import Structure, projection_names
from cl_prompts.interfaces import PrefixKV


TOLERANCE = 1e-4  # of the trial, relative to the largest output, in float32 and float64
TOLERANCE_HALF = 3e-2  # in half precision


def may_narrow(block: nn.Module, plan: PassPlan, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the last block, called with these arguments, can compute only the tokens that the plan reads."""
    if plan.read is None:
        return False
    # A prefix that is made from the block's tokens needs them all, and a recomputed block would not find them.
    prefix = plan.prefixes.get(layer)
    if prefix is not None and not (isinstance(prefix, PrefixKV) and prefix.logit_bias is None):
        return False
    if block.training and getattr(block, "gradient_checkpointing", False):
        return False
    others = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
    return not any(_holds_tensor(value) for value in others)


def install(attention: nn.Module) -> list[Any]:
    """Hook the key and value projections of the last block's attention; returns the handles, none if they are fused."""
    names = projection_names(attention)
    if names is None:
        return []
    projections = [getattr(attention, name) for name in names[1:]]
    return [
        *(projection.register_forward_pre_hook(_give_all_tokens) for projection in projections),
        *(projection.register_forward_hook(_fold_output) for projection in projections),
    ]


def _give_all_tokens(projection: nn.Module, args: tuple[Any, ...]) -> Any:
    block = BLOCK.get()
    return None if block is None or block.all_tokens is None else (block.all_tokens,)


def _fold_output(projection: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    block = BLOCK.get()
    return None if block is None or block.all_tokens is None else fold(output, block.read)


@torch.no_grad()
def narrowing_is_exact(
    model: nn.Module, structure: Structure, run: Callable[[PassPlan, Tensor, dict[str, Any]], None]
) -> bool:
    """Whether the narrowed block gives the plain block's numbers for two of five random tokens.

    Args:
        model: the base model.
        structure: where its parts are.
        run: runs the last block under a plan, with hidden states and keyword arguments.
    """
    block: Any = model.get_submodule(structure.blocks[-1])
    like = next(block.parameters())
    numbers = torch.randn(2, 5, structure.shape.width, generator=torch.Generator().manual_seed(0))
    hidden = numbers.to(execution_device(block), like.dtype)
    arguments = {"attention_mask": None} if "attention_mask" in signature(type(block).forward).parameters else {}
    plain, narrowed = PassPlan(PassRecord()), PassPlan(PassRecord(), read=(1, 2))
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            run(plain, hidden, arguments)
            run(narrowed, hidden, arguments)
    except Exception:  # a block that needs more than its tokens is not narrowed, whatever it raises
        return False
    assert plain.record.hidden is not None
    expected, found = plain.record.hidden[:, 1:3], narrowed.record.hidden
    tolerance = TOLERANCE if like.dtype in (torch.float32, torch.float64) else TOLERANCE_HALF
    if found is None or found.shape != expected.shape:
        return False
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(entry) for entry in value)
    return isinstance(value, Tensor)
