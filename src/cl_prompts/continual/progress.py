"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run stands.

    Args:
        task: number of the task that is being learnt, or comes next.
        begun: whether the model has begun it.
        epoch, step: what comes next in it: step number `step` of epoch number `epoch`.
        global_step: optimizer steps of all tasks so far.
        seconds: time spent so far, over all sittings.
    """

    task: int = 0
    begun: bool = False
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0
