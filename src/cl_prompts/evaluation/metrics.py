"""The accuracy matrix of a run and the measures of continual learning, with the four definitions of forgetting in use.

`tests/golden/metrics.json` holds the values that l2p-pytorch, mammoth, CODA-Prompt and SMoPE compute for one matrix.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_prompts.evaluation.calibration import Reliability
from cl_prompts.evaluation.novelty import NoveltyMeasures
from cl_prompts.runtime.files import write_atomically
from cl_prompts.runtime.text import first_line, short_repr


MAX_IMAGES = 2**40  # of a task; sums of them stay exact
# Measures that are also computed from task-incremental accuracies, if there are any.
TASK_INCREMENTAL = ("faa", "caa", "forgetting")


@dataclass
class AccuracyMatrix:
    """Accuracies `a[i][j]` in percent on task i after training task j. A column is added after each task.

    Args:
        columns: column j has the accuracies on tasks 0..j after task j.
        sizes: number of test images of each task, for micro averages.
        task_incremental: the same columns for logits masked to the classes of the image's task, or empty.
        before: accuracy on task i just before it was trained, by task. Only for tasks whose classes were known by then: in
            domain-incremental streams, not in class-incremental ones.
        baseline: accuracy on task i of the untrained model, by task.
        reliability: after each task, confidence and accuracy of the answers on all tasks seen; or empty.
        novelty: after a task, by its number: how well the novelty tells seen classes from those of tasks to come.
        drift: R^2 of the drift map on held-out images of a task, by its number; only where statistics were moved.
        needs_task: whether the learner needs the task of an image at test, so that only `task_incremental` accuracies and
            their measures have a meaning.
    """

    columns: list[list[float]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    task_incremental: list[list[float]] = field(default_factory=list)
    before: dict[int, float] = field(default_factory=dict)
    baseline: dict[int, float] = field(default_factory=dict)
    reliability: list[Reliability] = field(default_factory=list)
    novelty: dict[int, NoveltyMeasures] = field(default_factory=dict)
    drift: dict[int, float] = field(default_factory=dict)
    needs_task: bool = False

    def add(
        self,
        accuracies: Sequence[float],
        sizes: Sequence[int],
        task_incremental: Sequence[float] | None = None,
        reliability: Reliability | None = None,
    ) -> None:
        """Add the column of a task: accuracies in percent and numbers of test images of all tasks so far.

        Args:
            accuracies: accuracies on tasks 0..j, in percent.
            sizes: number of test images of tasks 0..j; those of earlier tasks must not change.
            task_incremental: task-incremental accuracies on tasks 0..j, for every column or for none.
            reliability: of the answers on all images of tasks 0..j, for every column or for none.

        Raises:
            ValueError: a list does not have one number per task so far, an accuracy is not between 0 and 100, or a size is
                not a positive integer or differs from an earlier one.
        """
        tasks = len(self.columns) + 1
        if len(accuracies) != tasks or len(sizes) != tasks:
            raise ValueError(
                f"column {tasks - 1} needs {tasks} accuracies and sizes, got {len(accuracies)} and {len(sizes)}"
            )
        for name, given, known in (
            ("task_incremental accuracies", task_incremental, self.task_incremental),
            ("reliability", reliability, self.reliability),
        ):
            if (given is not None) != bool(known) and self.columns:
                raise ValueError(f"column {tasks - 1}: give {name} for every column or for none")
        if task_incremental is not None and len(task_incremental) != tasks:
            raise ValueError(f"column {tasks - 1} needs {tasks} task_incremental accuracies, got {len(task_incremental)}")
        for value in (*accuracies, *(task_incremental or ())):
            _check_percent(value, f"column {tasks - 1}")
        if any(not 1 <= n <= MAX_IMAGES or n != int(n) for n in sizes):
            raise ValueError(
                f"column {tasks - 1}: sizes {short_repr(list(sizes))} must be numbers of test images, of at least 1 "
                f"(and at most {MAX_IMAGES:,})"
            )
        if self.sizes != [int(n) for n in sizes[:-1]]:
            raise ValueError(
                f"column {tasks - 1}: earlier tasks had {self.sizes} test images, now {list(sizes[:-1])}: accuracies on "
                "other images cannot be compared"
            )
        self.columns.append([float(a) for a in accuracies])
        self.sizes = [int(n) for n in sizes]
        if task_incremental is not None:
            self.task_incremental.append([float(a) for a in task_incremental])
        if reliability is not None:
            self.reliability.append(reliability)

    def shown(self) -> AccuracyMatrix:
        """The accuracies to show: the task-incremental ones of a learner that needs the task, else all as they are."""
        return AccuracyMatrix(self.task_incremental, self.sizes) if self.needs_task and self.task_incremental else self

    def table(self) -> NDArray[np.float64]:
        """The matrix a[i, j] as an array [tasks, tasks]; NaN for j < i, before task i was trained."""
        tasks = len(self.columns)
        table = np.full((tasks, tasks), np.nan)
        for j, column in enumerate(self.columns):
            table[: j + 1, j] = column
        return table

    def curve(self, *, micro: bool = False) -> list[float]:
        """Average accuracy over the tasks seen, after each task; with `micro`, the average over images."""
        weights = self.sizes if micro else [1] * len(self.columns)
        return [float(np.average(column, weights=weights[: len(column)])) for column in self.columns]

    def summary(self) -> dict[str, float]:
        """All measures, in percent except `nll`. Measures of earlier tasks are 0 after a single task.

        FAA: last point of the curve. CAA: mean of the curve. `forgetting`: best accuracy ever minus final, mean over
        earlier tasks (L2P, DualPrompt, HiDe, mammoth; never negative). `forgetting_before_final`: the same without the
        final column among the best. `forgetting_step`: mean drop per step (CODA-Prompt's). `forgetting_first`: accuracy
        when just learned minus final (avalanche's), the negative of `bwt`. `learning_accuracy`: accuracy when just learned.

        Only with `reliability`: `ece`, the expected calibration error after the last task in percent, `ece_largest`, the
        largest after any task, and `nll`, the mean negative log likelihood after the last task in nats.

        Only with `novelty`: `auroc` and `fpr95`, means over the tasks. Only with `drift`: `drift_r2`, the smallest R^2 (not
        in percent): below 0 the compensation did more harm than good.

        Only with `task_incremental`: `faa_task_incremental` and so on. Only with `before` for every later task:
        `accuracy_before`, its mean over them, and with `baseline` too `fwt`, the mean of before - baseline (Lopez-Paz &
        Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017).

        Raises:
            ValueError: no task was added yet.
        """
        if not self.columns:
            raise ValueError("no task was evaluated yet: add a column first")
        table, last = self.table(), len(self.columns) - 1
        macro, micro = self.curve(), self.curve(micro=True)
        old = table[:last]
        final, just_learned = old[:, last], np.diag(table)
        measures = {
            "faa": macro[-1],
            "caa": float(np.mean(macro)),
            "faa_micro": micro[-1],
            "caa_micro": float(np.mean(micro)),
            "learning_accuracy": float(np.mean(just_learned)),
        }
        drops = [np.mean(table[:t, t - 1] - table[:t, t]) for t in range(1, last + 1)]
        compared = {
            "forgetting": np.nanmax(old, axis=1) - final if last else [],
            "forgetting_before_final": np.nanmax(old[:, :last], axis=1) - final if last else [],
            "forgetting_step": drops,
            "forgetting_first": just_learned[:last] - final,
            "bwt": final - just_learned[:last],
        }
        measures |= {name: float(np.mean(values)) if last else 0.0 for name, values in compared.items()}
        if self.reliability:
            errors = [reliability.expected_calibration_error for reliability in self.reliability]
            measures |= {"ece": errors[-1], "ece_largest": max(errors)}
            measures["nll"] = self.reliability[-1].negative_log_likelihood
        if self.novelty:
            for name in ("auroc", "fpr95"):
                measures[name] = float(np.mean([getattr(found, name) for found in self.novelty.values()]))
        if self.drift:
            measures["drift_r2"] = min(self.drift.values())
        return measures | self._task_incremental_measures() | self._forward_measures()

    def _task_incremental_measures(self) -> dict[str, float]:
        if not self.task_incremental:
            return {}
        known = AccuracyMatrix(self.task_incremental, self.sizes).summary()
        return {f"{name}_task_incremental": known[name] for name in TASK_INCREMENTAL}

    def _forward_measures(self) -> dict[str, float]:
        later = range(1, len(self.columns))
        if not later or not set(later) <= self.before.keys():
            return {}
        measures = {"accuracy_before": float(np.mean([self.before[task] for task in later]))}
        if set(later) <= self.baseline.keys():
            measures["fwt"] = float(np.mean([self.before[task] - self.baseline[task] for task in later]))
        return measures

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, with the measures if a column was added."""
        copy: dict[str, Any] = {"columns": [list(c) for c in self.columns], "sizes": list(self.sizes)}
        if self.task_incremental:
            copy["task_incremental"] = [list(c) for c in self.task_incremental]
        for name, values in (("before", self.before), ("baseline", self.baseline)):
            if values:
                copy[name] = {str(task): value for task, value in values.items()}
        if self.reliability:
            copy["reliability"] = [reliability.to_dict() for reliability in self.reliability]
        if self.novelty:
            copy["novelty"] = {str(task): asdict(found) for task, found in self.novelty.items()}
        if self.drift:
            copy["drift"] = {str(task): explained for task, explained in self.drift.items()}
        if self.needs_task:
            copy["needs_task"] = True
        return copy | (self.summary() if self.columns else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AccuracyMatrix:
        """The matrix of `values`, which `to_dict` returned. Measures in `values` are ignored.

        Raises:
            ValueError: a part is missing or invalid.
        """
        try:
            columns, sizes = list(values["columns"]), list(values["sizes"])
            known = list(values.get("task_incremental", ()))
            reliability = [Reliability.from_dict(each) for each in values.get("reliability", ())]
            aside = {name: dict(values.get(name, {})) for name in ("before", "baseline")}
            if len(sizes) != len(columns) or any(part and len(part) != len(columns) for part in (known, reliability)):
                raise ValueError(
                    f"{len(columns)} columns, {len(known)} task-incremental ones, "
                    f"{len(sizes)} sizes, {len(reliability)} of reliability"
                )
            matrix = cls(needs_task=values.get("needs_task", False) is True)
            for j, column in enumerate(columns):
                matrix.add(column, sizes[: j + 1], known[j] if known else None, reliability[j] if reliability else None)
            for name, by_task in aside.items():
                for task, value in by_task.items():
                    _check_percent(value, f"{name} of task {task}")
                    getattr(matrix, name)[int(task)] = float(value)
            for task, found in dict(values.get("novelty", {})).items():
                matrix.novelty[int(task)] = NoveltyMeasures.from_dict(found)
            for task, explained in dict(values.get("drift", {})).items():
                matrix.drift[int(task)] = _r_squared(explained)
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"this is no accuracy matrix as `to_dict` writes it: {first_line(error)}") from error
        return matrix

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, for a checkpoint: `to_dict` without the measures."""
        known = {f.name for f in fields(self)}
        return {name: value for name, value in self.to_dict().items() if name in known}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace all fields by those of `state`.

        Raises:
            ValueError: a part is missing or invalid.
        """
        vars(self).update(vars(AccuracyMatrix.from_dict(state)))

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix to the CSV file `path`, with a row per task. `from_csv` reads the same numbers back.

        Columns: `task` (from 0), `images`, `after_0`, `after_1`, ..., and if there are these accuracies
        `task_incremental_after_0`, ..., `before`, `baseline`. Cells before a task was trained are empty. `reliability`,
        `novelty` and `drift` are left out.
        """
        tasks = len(self.columns)
        parts = [("after", self.columns), ("task_incremental_after", self.task_incremental)]
        aside = {name: values for name, values in (("before", self.before), ("baseline", self.baseline)) if values}
        header = ["task", "images", *(f"{name}_{j}" for name, columns in parts for j in range(len(columns))), *aside]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(header)
        for i in range(tasks):
            cells = [repr(column[i]) if i < len(column) else "" for _, columns in parts for column in columns]
            ends = [repr(values[i]) if i in values else "" for values in aside.values()]
            writer.writerow([i, self.sizes[i], *cells, *ends])
        write_atomically(path, text.getvalue())

    @classmethod
    def from_csv(cls, path: str | os.PathLike[str]) -> AccuracyMatrix:
        """Read the file `path` that `to_csv` wrote.

        Raises:
            ValueError: the file was not written by `to_csv`.
        """
        with Path(path).open(newline="") as file:
            reader = csv.DictReader(file)
            rows, header = list(reader), reader.fieldnames or []

        def column(name: str) -> list[float]:
            return [float(row[name]) for row in rows if row[name]]

        try:
            if header[:2] != ["task", "images"]:
                raise ValueError(f"its header is {header}")
            values: dict[str, Any] = {"columns": [column(f"after_{j}") for j in range(len(rows))]}
            values["sizes"] = [int(row["images"]) for row in rows]
            if "task_incremental_after_0" in header:
                values["task_incremental"] = [column(f"task_incremental_after_{j}") for j in range(len(rows))]
            for name in ("before", "baseline"):
                values[name] = {row["task"]: float(row[name]) for row in rows if row.get(name)}
            return cls.from_dict(values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no accuracy matrix as `to_csv` writes it: {error}") from error


def matrix_from_predictions(
    predictions: Sequence[int], references: Sequence[int], task_ids: Sequence[int], after_task: Sequence[int]
) -> AccuracyMatrix:
    """The accuracy matrix of single predictions, in any order.

    Args:
        predictions: predicted class of each image.
        references: class of each image; negative: padding, which is ignored.
        task_ids: number of each image's task, from 0.
        after_task: number of the task after whose training the prediction was made.

    Raises:
        ValueError: the lengths differ, a task number is negative, or there are no predictions for a task i after a task
            j >= i.
    """
    columns = [np.asarray(part, dtype=np.int64) for part in (predictions, references, task_ids, after_task)]
    if len({part.shape for part in columns}) > 1:
        lengths = [len(part) for part in columns]
        raise ValueError(f"predictions, references, task_ids and after_task must be alike in length, got {lengths}")
    predicted, wanted, task, after = (part[columns[1] >= 0] for part in columns)
    if not len(wanted):
        raise ValueError("there are no predictions")
    if min(task.min(), after.min()) < 0 or (task > after).any():
        raise ValueError("task_ids must be numbers of tasks from 0 that are at most after_task: later tasks are unseen")
    matrix = AccuracyMatrix()
    for j in range(int(after.max()) + 1):
        masks = [(after == j) & (task == i) for i in range(j + 1)]
        missing = [i for i, mask in enumerate(masks) if not mask.any()]
        if missing:
            raise ValueError(f"after task {j} there are no predictions for tasks {missing}: predict all tasks so far")
        hits = predicted == wanted
        matrix.add([100 * float(hits[mask].mean()) for mask in masks], [int(mask.sum()) for mask in masks])
    return matrix


def _check_percent(value: Any, where: str) -> None:
    if isinstance(value, str) or not 0 <= value <= 100:  # NaN is not, either
        raise ValueError(f"{where}: {short_repr(value)} is no accuracy in percent, from 0 to 100")


def _r_squared(value: Any) -> float:
    if type(value) not in (int, float) or not -1e12 <= value <= 1:
        raise ValueError(f"{short_repr(value)} is no R^2, at most 1")
    return float(value)
