"""Callbacks of the trainer, named as in transformers; a progress bar; and a tracker that writes JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import GeneralTracker, on_main_process
from tqdm.auto import tqdm

from cl_prompts.continual.checkpointing.checkpoint import CONTINUE
from cl_prompts.continual.state import TrainerState
from cl_prompts.continual.streams.stream import Task
from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.runtime.disk_full import explain_disk_full
from cl_prompts.runtime.files import write_atomically


class TrainerCallback:
    """Base class of callbacks. The trainer calls its methods on every process; they do nothing by default.

    Each method gets the `state` of the run and arguments of the event: the `task`, the number of the `epoch`, the `logs`
    by name, the `evaluations`, or the `folder` that was written. Settings, model and optimizer are fields of the state; in
    transformers they are separate arguments.
    """

    def on_train_begin(self, state: TrainerState) -> None:
        """Before the first task, or before a resumed run continues."""

    def on_task_begin(self, state: TrainerState, task: Task) -> None:
        """After `model.begin_task`. Not called again if a run is resumed within the task."""

    def on_epoch_begin(self, state: TrainerState, task: Task, epoch: int) -> None:
        """Before an epoch, or before a resumed run continues in it."""

    def on_step_begin(self, state: TrainerState, task: Task) -> None:
        """Before an optimizer step, after its batch was loaded."""

    def on_step_end(self, state: TrainerState, task: Task) -> None:
        """After an optimizer step; `state.progress` has its number."""

    def on_epoch_end(self, state: TrainerState, task: Task, epoch: int) -> None:
        """After an epoch's last step."""

    def on_log(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Every `logging_steps` steps, with loss, its parts, learning rate and images per second."""

    def on_evaluate(self, state: TrainerState, evaluations: list[Evaluation]) -> None:
        """After the evaluation at the end of a task; `evaluations` has one entry per task so far."""

    def on_save(self, state: TrainerState, folder: Path) -> None:
        """After a checkpoint was written. Called on the main process only."""

    def on_task_end(self, state: TrainerState, task: Task) -> None:
        """After a task's evaluation, before its checkpoint."""

    def on_train_end(self, state: TrainerState) -> None:
        """After the last task."""


class ProgressBar(TrainerCallback):
    """A progress bar over the steps of each task with images/s and loss, and a line with the accuracies after the task.

    Args:
        accuracies: whether to print the accuracies.
    """

    def __init__(self, *, accuracies: bool = True) -> None:
        self.accuracies = accuracies
        self.bar: Any = None

    def on_epoch_begin(self, state: TrainerState, task: Task, epoch: int) -> None:
        """Open the task's bar."""
        if self.bar is None and PartialState().is_local_main_process:
            name = f"task {task.number + 1}/{len(state.stream)}"
            self.bar = tqdm(total=state.task_steps, initial=state.task_steps_done, desc=name, unit="step", leave=False)

    def on_step_end(self, state: TrainerState, task: Task) -> None:
        """Advance by one step."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Show loss and speed."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", images=f"{logs['images_per_second']:.0f}/s")

    def on_evaluate(self, state: TrainerState, evaluations: list[Evaluation]) -> None:
        """Close the bar and print the accuracies."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if not self.accuracies:
            return
        matrix = state.matrix.shown()
        row, told = " ".join(f"{a:5.1f}" for a in matrix.columns[-1]), " with the task known" * state.matrix.needs_task
        PartialState().print(f"after task {len(evaluations)}: average {matrix.curve()[-1]:5.1f} %{told}   by task: {row}")


class JsonlTracker(GeneralTracker):
    """A tracker for Accelerate that writes one JSON object per line to `log.jsonl`.

    Args:
        folder: results folder.

    Attributes:
        lines: number of lines so far.
    """

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path, self.lines = Path(folder) / "log.jsonl", 0

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Does nothing: the settings are in other files of the results folder."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append a line with `step` and `values`. `kwargs`, meant for other trackers, are ignored.

        Raises:
            OSError: the disk is full. No part of the line stays in the file.
        """
        with explain_disk_full(self.path, CONTINUE):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            before = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError:
                with suppress(OSError):
                    os.truncate(self.path, before)
                raise
        self.lines += 1

    def state_dict(self) -> dict[str, int]:
        """The number of `lines`, for a checkpoint."""
        return {"lines": self.lines}

    @on_main_process
    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Keep only the lines written before the checkpoint with this `state`; a resumed run writes the others again."""
        kept = self.path.read_bytes().splitlines(keepends=True)[: state["lines"]] if self.path.exists() else []
        if kept and not kept[-1].endswith(b"\n"):
            kept.pop()  # cut short when the machine went down
        self.lines = len(kept)
        if self.path.exists():
            write_atomically(self.path, b"".join(kept))
