"""Gradient checkpointing of blocks whose part of the plan is not among their arguments.

From 5.23 on, transformers checkpoints the `forward` of a block, with what the hooks have put among its arguments; a block
that takes no keyword arguments looks for its part in a context variable. Before 5.23, it checkpoints the call of the block,
and the hooks run again when it recomputes. In the backward pass no pass is in progress, so both have to find theirs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from cl_prompts.backbones.block_info import BlockInfo
from cl_prompts.backbones.plan import RUNNING, RunningPass
from cl_prompts.backbones.prefix import PLAIN_BLOCK, PlainBlock
from cl_prompts.backbones.structure import Structure


FUNCTION = "_gradient_checkpointing_func"


def recomputes_plan(block: nn.Module) -> bool:
    """Whether a recomputation of this block looks for a plan: in its hooks, or for lack of keyword arguments."""
    info: BlockInfo = block._cl_block  # type: ignore[assignment]
    return type(block).__call__ is not nn.Module.__call__ or not info.takes_keywords


def recomputing(model: nn.Module, structure: Structure) -> list[nn.Module]:
    """The modules that have to find the plan of their pass again: such blocks, and a stage, checkpointed as a whole."""
    blocks = [model.get_submodule(name) for name in structure.blocks]
    stage = [model.get_submodule(structure.blocks[0].rsplit(".", 2)[0])] if structure.shape.windowed else []
    return stage + [block for block in blocks if recomputes_plan(block)]


def keep_plans(blocks: list[nn.Module]) -> None:
    """Let blocks find the plan of their pass again when they are recomputed; once after checkpointing is switched on."""
    for block in blocks:
        checkpoint = vars(block).get(FUNCTION)
        if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPlan):
            setattr(block, FUNCTION, CheckpointWithPlan(checkpoint))


def refuse_checkpointed_sequence(backbone: nn.Module) -> None:
    """Raise ValueError if a backbone of timm is set to checkpoint its blocks, which runs their hooks without a plan."""
    if getattr(backbone, "grad_checkpointing", False) and torch.is_grad_enabled():
        raise ValueError(
            "timm's gradient checkpointing runs blocks again without their prompts: switch it off with "
            "gradient_checkpointing_disable() of the base"
        )


@dataclass(frozen=True)
class CheckpointWithPlan:
    """A checkpointing function that recomputes in the pass in which it was called.

    Args:
        checkpoint: the function that transformers gives the block.
    """

    checkpoint: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint `run(*args)`."""
        return self.checkpoint(partial(_run_in, RUNNING.get(), PLAIN_BLOCK.get(), run), *args)


def _run_in(running: RunningPass | None, block: PlainBlock | None, run: Callable[..., Any], *args: Any) -> Any:
    before = RUNNING.get(), PLAIN_BLOCK.get()
    RUNNING.set(running)
    PLAIN_BLOCK.set(block)
    try:
        return run(*args)
    finally:
        RUNNING.set(before[0])
        PLAIN_BLOCK.set(before[1])
