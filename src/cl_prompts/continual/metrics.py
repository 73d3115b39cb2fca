"""Accuracy over tasks and what the field makes of it; four numbers are called "forgetting", and all are here.

`tests/golden/metrics.json` holds what l2p-pytorch, mammoth, CODA-Prompt and SMoPE compute for one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class AccuracyMatrix:
    """Accuracies a[i][j] in percent on task i after training task j, filled a column per task.

    Args:
        columns: column j holds the accuracies on tasks 0..j after task j.
        sizes: number of test images of each task, for micro averages.
    """

    columns: list[list[float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def add(self, accuracies: list[float], sizes: list[int]) -> None:
        """Add the column of a task: accuracies in percent and numbers of test images of all tasks so far.

        Raises:
            ValueError: there is not one number for every task so far.
        """
        tasks = len(self.columns) + 1
        if len(accuracies) != tasks or len(sizes) != tasks:
            raise ValueError(
                f"column {tasks - 1} needs {tasks} accuracies and sizes, got {len(accuracies)} and {len(sizes)}"
            )
        self.columns.append([float(a) for a in accuracies])
        self.sizes = [int(n) for n in sizes]

    def table(self) -> NDArray[np.float64]:
        """a[i, j] as an array; NaN where task i had not come yet."""
        tasks = len(self.columns)
        table = np.full((tasks, tasks), np.nan)
        for j, column in enumerate(self.columns):
            table[: j + 1, j] = column
        return table

    def curve(self, *, micro: bool = False) -> list[float]:
        """Average accuracy over the tasks seen, after each task: every task alike, or (micro) every image alike."""
        weights = self.sizes if micro else [1] * len(self.columns)
        return [float(np.average(column, weights=weights[: len(column)])) for column in self.columns]

    def summary(self) -> dict[str, float]:
        """All measures, in percent. Those that compare with earlier tasks are 0 after a single task.

        FAA: last point of the curve. CAA: mean of the curve. `forgetting`: best accuracy ever minus final, mean over
        earlier tasks (L2P, DualPrompt, HiDe, mammoth; never negative). `forgetting_before_final`: the same without the
        final column among the best. `forgetting_step`: mean drop per step (CODA-Prompt's). `forgetting_first`: accuracy
        when just learnt minus final (avalanche's), the negative of `bwt`. `learning_accuracy`: accuracy when just learnt.

        Raises:
            ValueError: no task was added yet.
        """
        if not self.columns:
            raise ValueError("no task was evaluated yet: add a column first")
        table, last = self.table(), len(self.columns) - 1
        macro, micro = self.curve(), self.curve(micro=True)
        old = table[:last]
        final, just_learnt = old[:, last], np.diag(table)
        measures = {
            "faa": macro[-1],
            "caa": float(np.mean(macro)),
            "faa_micro": micro[-1],
            "caa_micro": float(np.mean(micro)),
            "learning_accuracy": float(np.mean(just_learnt)),
        }
        drops = [np.mean(table[:t, t - 1] - table[:t, t]) for t in range(1, last + 1)]
        compared = {
            "forgetting": np.nanmax(old, axis=1) - final if last else [],
            "forgetting_before_final": np.nanmax(old[:, :last], axis=1) - final if last else [],
            "forgetting_step": drops,
            "forgetting_first": just_learnt[:last] - final,
            "bwt": final - just_learnt[:last],
        }
        return measures | {name: float(np.mean(values)) if last else 0.0 for name, values in compared.items()}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy with the measures."""
        return {"columns": self.columns, "sizes": self.sizes, **self.summary()}
