"""What one pass through a frozen model does besides the model's own work.

A `PassPlan` is made for one pass and is not changed afterwards. The hooks of `PromptedBackbone` read the plan of the pass
they run in through context variables, so two threads, two models on one base, or a pass inside a pass never see the plan
of one another. What a pass computes goes into the plan's own `PassRecord`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from cl_prompts.interfaces import Prefix, PrefixKV, Probe


T = TypeVar("T")


@dataclass
class PassRecord:
    """What one pass computed.

    Args:
        hidden: output of the last block without the prompt tokens [B, N, D], or only the tokens read if `narrowed`.
        prompt_hidden: output of the last block at the prompt tokens [B, P, D]; None without prompt tokens.
        pooled: the model's own pooled feature [B, D]; None for a model without a pooler that reads all tokens.
        block_input: what entered block 0 [B, N, D], prompt tokens excluded; only if the plan keeps it.
        embeddings: output of the embeddings module; only if the plan keeps it.
        lower_blocks: output of block `keep_below - 1`; only if the plan keeps it.
        prefixes: the prefixes used, by block number.
        beside: where attention runs in windows, the prompt tokens that enter a block [B, P, D], by its number.
        narrowed: whether the last block computed only the tokens read.
    """

    hidden: Tensor | None = None
    prompt_hidden: Tensor | None = None
    pooled: Tensor | None = None
    block_input: Tensor | None = None
    embeddings: Any = None
    lower_blocks: Any = None
    prefixes: dict[int, PrefixKV] = field(default_factory=dict)
    beside: dict[int, Tensor] = field(default_factory=dict)
    narrowed: bool = False


@dataclass(frozen=True)
class Reuse:
    """Outputs of an earlier pass over the same images, used in place of running the modules that computed them.

    Args:
        below: number of blocks that are not run.
        embeddings: output of the embeddings module; None if it is run.
        lower_blocks: output of block `below - 1`; None if `below` is 0.
    """

    below: int
    embeddings: Any
    lower_blocks: Any


@dataclass(frozen=True)
class PassPlan:
    """What the hooks do in one pass.

    Args:
        record: takes what the pass computes; a new one for each plan, without a default because Dynamo cannot trace one.
        tokens: prompt tokens [B, P, D] to insert in front of block 0; None: none.
        token_index: position of the first prompt token in the sequence.
        prefixes: prefix by block number.
        read: (first token, number of tokens) of the sequence that are read behind the last block; None: all.
        reuse: outputs to use instead of running embeddings and lower blocks.
        keep_below: keep the output of the embeddings and of the blocks below this number in the record; None: keep neither.
        keep_block_input: keep what enters block 0 in the record.
        repeats: number of passes for each image; tokens and prefixes have B * repeats rows.
        learning: whether gradients must reach the prefixes.
        arguments: further arguments of the model's forward, which those of the call override.
        probe: called with the attention of each block that has a prefix; None: not called. All tokens must be read.
    """

    record: PassRecord
    tokens: Tensor | None = None
    token_index: int = 0
    prefixes: Mapping[int, Prefix] = field(default_factory=dict)
    read: tuple[int, int] | None = None
    reuse: Reuse | None = None
    keep_below: int | None = None
    keep_block_input: bool = False
    repeats: int = 1
    learning: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    probe: Probe = None


@dataclass(frozen=True)
class RunningPass:
    """A pass in progress.

    Args:
        backbone: the `PromptedBackbone` that runs it.
        plan: its plan; None for a plain pass of the model, which the hooks leave alone.
        answer: what the model returns in place of its output, given its `return_dict` argument; None: its own output.
        outer: the pass in which this one was started.
    """

    backbone: object
    plan: PassPlan | None = None
    answer: Callable[[bool], Any] | None = None
    outer: RunningPass | None = None


class CallVariable(Generic[T]):
    """A context variable that `torch.compile` can trace.

    Dynamo cannot trace `ContextVar`. While it traces, the value is a plain attribute. The compiled graph has the plan's
    tensors as its inputs and does not look at the attribute again, so compiled calls are as separate as others.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self._traced: T | None = None

    def get(self) -> T | None:
        """The value in this context."""
        if torch.compiler.is_dynamo_compiling():
            return self._traced
        return self._variable.get()

    def set(self, value: T | None) -> None:
        """Set the value in this context."""
        if torch.compiler.is_dynamo_compiling():
            self._traced = value
        else:
            self._variable.set(value)


# The pass that the next forward of its base model starts, and the innermost pass in progress.
STARTING: CallVariable[RunningPass] = CallVariable("cl_prompts_starting_pass")
RUNNING: CallVariable[RunningPass] = CallVariable("cl_prompts_running_pass")


def running_plan() -> PassPlan | None:
    """The plan of the innermost pass in progress; None outside one and in a plain pass."""
    running = RUNNING.get()
    return None if running is None else running.plan
