"""Batches of row numbers to which rehearsed rows are added."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cl_prompts.continual.streams.loading import Rows, padding_index, process_shard, rank_and_processes


_SEED_SUFFIX = 2  # makes these draws differ from others with the same seed, task, epoch and step


class RehearsedBatches:
    """Batch sampler of this process: its shard of each global batch, followed by its shard of the rehearsed rows.

    The rehearsed rows of a batch are drawn when the batch is requested.

    Args:
        batches: this process's shards of the global batches.
        memory: returns the row numbers that are in the memory at the time of the call.
        size: number of rehearsed rows of each global batch, drawn without replacement; all if there are fewer.
        seed: (seed, task, epoch) of the draws; the number of the step is added.
        start: number of batches at the beginning to leave out.
    """

    def __init__(
        self,
        batches: Sequence[list[int]],
        memory: Callable[[], Rows],
        size: int,
        seed: tuple[int, int, int],
        start: int = 0,
    ) -> None:
        self.batches, self.memory, self.size, self.seed, self.start = batches, memory, size, seed, start

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, len(self.batches)):
            memory = self.memory()
            random = np.random.default_rng([*self.seed, step, _SEED_SUFFIX])
            drawn = random.choice(memory, min(self.size, len(memory)), replace=False).tolist() if len(memory) else []
            yield self.batches[step] + process_shard(drawn, *rank_and_processes(), padding_index)
