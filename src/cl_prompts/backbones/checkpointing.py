"""Gradient checkpointing of transformers before 5.23, which runs the hooks of a block again when it recomputes the block.

From 5.23 on it checkpoints the `forward` of a block, with what the hooks have put among its arguments. Before, it
checkpoints the call of the block, hooks included; in the backward pass, when it recomputes, no pass is in progress.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from cl_prompts.backbones.plan import RUNNING, RunningPass


FUNCTION = "_gradient_checkpointing_func"


def recomputes_hooks(block: nn.Module) -> bool:
    """Whether checkpointing this block would run its hooks again."""
    return type(block).__call__ is not nn.Module.__call__


def keep_plans(blocks: list[nn.Module]) -> None:
    """Let blocks whose hooks are recomputed find the plan of their pass again; once after checkpointing is switched on."""
    for block in blocks:
        checkpoint = vars(block).get(FUNCTION)
        if checkpoint is not None and not isinstance(checkpoint, CheckpointWithPlan):
            setattr(block, FUNCTION, CheckpointWithPlan(checkpoint))


@dataclass(frozen=True)
class CheckpointWithPlan:
    """A checkpointing function that recomputes in the pass in which it was called.

    Args:
        checkpoint: the function that transformers gives the block.
    """

    checkpoint: Callable[..., Any]

    def __call__(self, run: Callable[..., Any], *args: Any) -> Any:
        """Checkpoint `run(*args)`."""
        return self.checkpoint(partial(_run_in, RUNNING.get(), run), *args)


def _run_in(running: RunningPass | None, run: Callable[..., Any], *args: Any) -> Any:
    before = RUNNING.get()
    RUNNING.set(running)
    try:
        return run(*args)
    finally:
        RUNNING.set(before)
