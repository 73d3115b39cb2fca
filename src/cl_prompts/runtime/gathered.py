"""Statistics that are summed over processes once a task, instead of in every step."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cl_prompts.runtime.distributed import sum_over_processes, world_size


class GatheredStatistics(nn.Module):
    """A module with sums over all processes. Each process keeps what it adds to them until `gather`.

    With one process, sums are complete at once. A subclass calls `wait` in place of adding, and defines `add_sums`.

    Attributes:
        waiting: this process's share of sums that have not been gathered; empty if all have.
    """

    waiting: tuple[Tensor, ...] = ()

    def wait(self, *sums: Tensor) -> None:
        """Keep this process's `sums` for `gather`; every call has the same ones in the same order."""
        self.waiting = tuple(old + new for old, new in zip(self.waiting, sums, strict=True)) if self.waiting else sums
        if world_size() == 1:
            self.gather()

    def gather(self) -> None:
        """Sum over processes what waits. All processes must call it after the same number of steps."""
        if self.waiting:
            sums, self.waiting = self.waiting, ()
            self.add_sums(*(sum_over_processes(own) for own in sums))

    def add_sums(self, *sums: Tensor) -> None:
        """Add the `sums` of all processes to the statistics."""
        raise NotImplementedError(f"{type(self).__name__} waits for sums, so it must define add_sums")

    def check_gathered(self) -> None:
        """Check that the statistics are those of all processes.

        Raises:
            ValueError: this process has added something to them since they were gathered.
        """
        if self.waiting:
            raise ValueError(
                "each process has counted its own images of this task: call model.gather_statistics() on every process "
                "before the model is saved or answers within a task (end_task, consolidate and evaluate do it themselves)"
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.check_gathered()
        super()._save_to_state_dict(destination, prefix, keep_vars)


def gather_statistics(module: nn.Module) -> None:
    """Gather the statistics of all parts of a `module`."""
    for part in module.modules():
        if isinstance(part, GatheredStatistics):
            part.gather()


def check_gathered(module: nn.Module) -> None:
    """Check that the statistics of all parts of a `module` are those of all processes; ValueError if not."""
    for part in module.modules():
        if isinstance(part, GatheredStatistics):
            part.check_gathered()
