"""Batches of row numbers with rehearsed ones behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from cl_prompts.continual.streams.loading import Rows, own_share, rank_and_processes


_PURPOSE = 2  # keeps these draws apart from others that begin with the same numbers


class RehearsedBatches:
    """This process's batches, each with its share of rehearsed rows that are drawn when the batch is asked for.

    Args:
        batches: this process's shares of the global batches.
        memory: gives the row numbers that are remembered at that moment.
        size: how many of them join each global batch, without repetition; all where there are fewer.
        seed: (seed, task, epoch) of the draws, whose last number is that of the step.
        start: steps of the epoch that are left out.
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
            random = np.random.default_rng([*self.seed, step, _PURPOSE])
            drawn = random.choice(memory, min(self.size, len(memory)), replace=False).tolist() if len(memory) else []
            yield self.batches[step] + own_share(drawn, *rank_and_processes(), lambda row: -1 - row)
