"""What looks on while the trainer works: callbacks with the names HF users know, a progress bar, a JSONL tracker."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import GeneralTracker, on_main_process
from tqdm.auto import tqdm

from cl_prompts.runtime.files import write_atomically


if TYPE_CHECKING:
    from cl_prompts.continual.streams.stream import Task
    from cl_prompts.continual.trainer import ContinualTrainer
    from cl_prompts.evaluation.evaluate import Evaluation


class TrainerCallback:
    """Called by the trainer on every process; override what you need.

    Each method gets the `trainer`, and what it speaks of: the `task`, the number of the `epoch`, the `logs` by name, what
    was `measured`, or the `folder` that was written.
    """

    def on_train_begin(self, trainer: ContinualTrainer) -> None:
        """Before the first task, or where a resumed run goes on."""

    def on_task_begin(self, trainer: ContinualTrainer, task: Task) -> None:
        """The model has begun the task; not called again by a run resumed inside it."""

    def on_epoch_begin(self, trainer: ContinualTrainer, task: Task, epoch: int) -> None:
        """Before an epoch, or where a resumed run goes on in it."""

    def on_step_begin(self, trainer: ContinualTrainer, task: Task) -> None:
        """Before an optimizer step, its batch at hand."""

    def on_step_end(self, trainer: ContinualTrainer, task: Task) -> None:
        """After an optimizer step; `trainer.progress` says which."""

    def on_epoch_end(self, trainer: ContinualTrainer, task: Task, epoch: int) -> None:
        """After an epoch's last step."""

    def on_log(self, trainer: ContinualTrainer, logs: dict[str, float]) -> None:
        """Every `log_every` steps, with loss, its parts, learning rate and images per second."""

    def on_evaluate(self, trainer: ContinualTrainer, measured: list[Evaluation]) -> None:
        """After the evaluation that follows a task: one for each task so far."""

    def on_save(self, trainer: ContinualTrainer, folder: Path) -> None:
        """After a checkpoint was written; on the main process only."""

    def on_task_end(self, trainer: ContinualTrainer, task: Task) -> None:
        """After a task's evaluation, before its checkpoint."""

    def on_train_end(self, trainer: ContinualTrainer) -> None:
        """After the last task."""


class ProgressBar(TrainerCallback):
    """A bar over the steps of each task with images/s, loss and time left; a line with the accuracies after it."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_epoch_begin(self, trainer: ContinualTrainer, task: Task, epoch: int) -> None:
        """Open the task's bar."""
        if self.bar is None and trainer.accelerator.is_local_main_process:
            steps = trainer.steps_of(task)
            done = trainer.steps_done(task)
            name = f"task {task.number + 1}/{len(trainer.stream)}"
            self.bar = tqdm(total=steps, initial=done, desc=name, unit="step", leave=False)

    def on_step_end(self, trainer: ContinualTrainer, task: Task) -> None:
        """One step on."""
        if self.bar is not None:
            self.bar.update()

    def on_log(self, trainer: ContinualTrainer, logs: dict[str, float]) -> None:
        """Show loss and speed."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", images=f"{logs['images_per_second']:.0f}/s")

    def on_evaluate(self, trainer: ContinualTrainer, measured: list[Evaluation]) -> None:
        """Close the bar and print the accuracies."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        row = " ".join(f"{m.accuracy:5.1f}" for m in measured)
        average = trainer.matrix.curve()[-1]
        trainer.accelerator.print(f"after task {len(measured)}: average {average:5.1f} %   by task: {row}")


class JsonlTracker(GeneralTracker):
    """Accelerate's tracker without a service: a JSON object per line in `log.jsonl`.

    Args:
        folder: results folder.
    """

    name = "jsonl"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "log.jsonl"

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Nothing: the results folder holds the settings."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Append a line: `step` and `values`; `kwargs` of other trackers are ignored."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop lines of steps after `step`, which a resumed run takes again, and a line that was cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
