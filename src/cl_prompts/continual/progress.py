"""Position of a run in its stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Progress:
    """Position of a run in its stream.

    Args:
        task: number of the current or next task.
        begun: whether `begin_task` was called for it.
        epoch, step: numbers of the next epoch and step in it.
        global_step: number of optimizer steps so far, over all tasks.
        seconds: training time so far, including that before a resume.
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
