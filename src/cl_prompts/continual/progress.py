"""Position of a run in its stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Position of a run in its stream.

    Args:
        task: number of the task that is being trained, or comes next.
        begun: whether the model has begun it.
        epoch, step: what comes next in it: step number `step` of epoch number `epoch`.
        global_step: optimizer steps of all tasks so far.
        seconds: training time so far, over all sittings of a resumed run.
    """

    task: int = 0
    begun: bool = False
    epoch: int = 0
    step: int = 0
    global_step: int = 0
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`."""
        vars(self).update(vars(Progress(**state)))
