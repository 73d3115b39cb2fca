"""Use of the rehearsal memory in a run: adding images to it, and choosing the rows to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from cl_prompts.continual.feature_cache.provider import FeatureProvider
from cl_prompts.continual.rehearsal import RehearsalMemory
from cl_prompts.continual.streams.indexed import IndexedStream, require_indexed
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.distributed import gather_over_processes


class Replay:
    """The memory of a run, used according to the learner's `replay`: "mixed", "memory_only" or "none".

    Args:
        memory: the memory; None: no rehearsal.
        model: the learner.
        stream: the stream.
        feature_provider: provides images to a learner that ranks them.
    """

    def __init__(
        self, memory: RehearsalMemory | None, model: Learner, stream: Stream, feature_provider: FeatureProvider
    ) -> None:
        self.memory, self.model, self.stream, self.feature_provider = memory, model, stream, feature_provider

    @property
    def _indexed(self) -> IndexedStream:
        return require_indexed(self.stream, "rehearsal")

    def rows(self, task: Task) -> Rows | None:
        """Row numbers to train on instead of all of the task's own; None: all of the task's own."""
        if self.memory is not None and self.model.replay == "memory_only":
            return self.memory.rows
        return self.feature_provider.trained_rows(task)

    @property
    def mixed_rows(self) -> Rows | Callable[[], Rows] | None:
        """Row numbers to add to the batches: those at the start of the task or, without tasks, the current ones."""
        memory = self.memory
        if memory is None or self.model.replay != "mixed":
            return None
        return (lambda: memory.rows) if self.stream.task_free else memory.rows

    def steps_per_epoch(self, task: Task, batch_size: int) -> int:
        """Number of batches of an epoch."""
        rows = self.rows(task)
        if rows is None:
            return self.stream.steps_per_epoch(task, batch_size)
        return self._indexed.steps_per_epoch(task, batch_size, rows)

    def begin_task(self, task: Task) -> None:
        """Add the task's images to the memory if the learner trains on the memory only."""
        if self.model.replay == "memory_only":
            self._add(task)

    def end_task(self, task: Task) -> None:
        """Add the task's images if they were not added at its beginning."""
        if self.model.replay != "memory_only":
            self._add(task)

    def _add(self, task: Task) -> None:
        if self.memory is None or self.stream.task_free:
            return
        rows = self._indexed.tasks[task.number].train_rows
        with self.feature_provider.eval_mode():
            ranking = self.model.rank_images(rows, self.feature_provider.images(rows))
        self.memory.add(rows, self._indexed.train_labels[rows], ranking)

    def observe(self, batch: Mapping[str, Any], device: torch.device) -> None:
        """Without tasks, offer the images of a batch to the memory. All processes call it.

        Args:
            batch: this process's share.
            device: device for gathering row numbers.
        """
        if self.memory is None or not self.stream.task_free:
            return
        ids = torch.cat(gather_over_processes(torch.tensor(batch["sample_ids"], device=device)))
        rows = ids[ids >= 0].cpu().numpy()
        rows = rows[~np.isin(rows, self.memory.rows)]  # rehearsed images are in the memory already
        self.memory.observe(rows, self._indexed.train_labels[rows])
