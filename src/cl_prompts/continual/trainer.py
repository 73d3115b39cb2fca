"""Learning a stream of tasks on any device or many, with Accelerate; a killed run goes on where it was.

The trainer knows a learner by the public interface of `PromptPoolModel`: `begin_task`, `end_task`, `classes`,
`parameter_groups`, `attach_optimizer`, `needs_query`, `training_state`, ...
(`cl_prompts.tuner.task_api.TaskLearner`). Comparison learners (`baselines/`) have the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.batches import micro_batches, on_device
from cl_prompts.continual.callbacks import JsonlTracker, TrainerCallback
from cl_prompts.continual.checkpointing.checkpoint import Checkpoints
from cl_prompts.continual.checkpointing.snapshot import (
    Saved,
    checked,
    put_back,
    put_back_optimizer,
    put_back_random_state,
    taken,
)
from cl_prompts.continual.extra_classifiers import SideClassifiers
from cl_prompts.continual.feature_cache.provider import Viewer
from cl_prompts.continual.optimization import build_optimizer, keep_state, rate_factor, set_rates
from cl_prompts.continual.progress import Progress
from cl_prompts.continual.rehearsal import RehearsalMemory
from cl_prompts.continual.run_checks import check_engine, check_run
from cl_prompts.continual.streams.indexed import IndexedStream, require_indexed
from cl_prompts.continual.streams.loading import Rows
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.evaluation.evaluate import Evaluation, evaluate
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.heads import FeatureClassifier
from cl_prompts.interfaces import IGNORE_INDEX
from cl_prompts.runtime.distributed import gather_over_processes, sum_over_processes, world_size
from cl_prompts.runtime.memory import freed_memory_kept


class ContinualTrainer:
    """Trains a learner task after task and evaluates it on all tasks seen after each.

    Args:
        model: a `PromptPoolModel` or a comparison learner, not wrapped.
        stream: the tasks.
        args: settings.
        accelerator: None: one is made with `args.mixed_precision`.
        callbacks: look on.
        trackers: Accelerate's trackers besides the log in the results folder, like ["tensorboard"].
        classifiers: further classifiers to be measured on the learner's features, new ones (`side.matrices`).

    Attributes:
        matrix: accuracies, class-incremental: nobody tells the task.
        progress: where the run stands.
        measured: the newest evaluation, one for each task seen.
        memory: the rehearsed images, None without rehearsal.

    Raises:
        ValueError: the settings do not fit the model or the stream.
    """

    def __init__(
        self,
        model: Any,
        stream: Stream,
        args: ContinualArguments,
        *,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        trackers: Sequence[str] = (),
        classifiers: Mapping[str, FeatureClassifier] | None = None,
    ) -> None:
        self.model, self.stream, self.args = model, stream, args
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.log = JsonlTracker(self.folder) if self.folder else None
        self.accelerator = accelerator or Accelerator(mixed_precision=args.mixed_precision, project_dir=self.folder)
        check_engine(self.accelerator.distributed_type)
        self.accelerator.log_with = [*trackers, *([self.log] if self.log else [])]
        self.callbacks = list(callbacks)
        self.checkpoints = Checkpoints(self.folder / "checkpoints") if self.folder else None
        self.matrix = AccuracyMatrix()
        self.progress = Progress()
        self.measured: list[Evaluation] = []
        self.memory = self._new_memory()
        self.side = SideClassifiers(model, classifiers or {})
        self.optimizer: torch.optim.Optimizer | None = None
        self.model.to(self.accelerator.device)
        self.viewer = Viewer(model, stream, args, self.accelerator)
        self._started = time.perf_counter()
        self._window = (0, self._started)  # images since the last line of the log, and when it was written
        check_run(model, stream, args, self.side.classifiers)

    def _new_memory(self) -> RehearsalMemory | None:
        args = self.args
        if not args.rehearses:
            return None
        return RehearsalMemory(args.memory_size or None, args.memory_per_class or None, seed=args.seed)

    # ---- the run -----------------------------------------------------------------------------------------------------

    @freed_memory_kept()
    def train(self, *, resume: bool = False) -> AccuracyMatrix:
        """Learn all tasks and return the accuracies.

        Args:
            resume: go on from the newest whole checkpoint in the results folder, if there is one. The run then ends with
                the parameters and accuracies of an uninterrupted one: bit-equal on the same machine with the same threads,
                processes and precision.

        Raises:
            ValueError: the checkpoints in the results folder are of another run, or this trainer has trained already.
            FloatingPointError: the loss is no longer finite.
        """
        if self.measured and not resume:
            raise ValueError("this trainer has trained already: make a new one, with a new model")
        saved = self._saved(resume)
        if saved is not None:
            put_back(self, saved)
        if self.log is not None and self.accelerator.is_main_process:
            self.log.forget_after(self.progress.global_step if saved is not None else -1)
        self.accelerator.init_trackers("cl_prompts", config=None)
        self._started = time.perf_counter() - self.progress.seconds
        if saved is not None:
            # Only now: what was done since the start of the process has drawn random numbers that the whole run had not.
            put_back_random_state(self, saved)
        self._call("on_train_begin")
        for task in self.stream.tasks[self.progress.task :]:
            self._learn(task, saved)
            saved = None
        if not self.measured:  # killed after its last checkpoint
            self.measured = [self._measure(task) for task in self.stream.tasks]
        self._call("on_train_end")
        for tracker in self.accelerator.trackers:
            tracker.finish()  # not end_training, which takes the processes apart: others may still need them
        return self.matrix

    def _learn(self, task: Task, saved: Saved | None) -> None:
        """One task, from where the run stands to its checkpoint."""
        progress = self.progress
        before = dict(self.model.named_parameters()) if self.args.keep_optimizer else {}
        if not progress.begun:
            self._begin(task)
        if self._trains(task):
            self._train(task, before, saved)
        self._finish(task)
        self._evaluate(task)
        progress.task, progress.begun, progress.epoch, progress.step = task.number + 1, False, 0, 0
        self._call("on_task_end", task)
        self._save()

    def _begin(self, task: Task) -> None:
        model = self.model
        if self.args.forward_transfer and task.number and set(task.classes) <= set(model.classes):
            self.matrix.before[task.number] = self._measure(task, side=False).accuracy
        if task.number:
            with self.viewer.still():
                if model.needs_features_before:
                    model.record_features(self.viewer.task_images(task))
                if self.side.needs_before:
                    self.side.record(self.viewer.task_images(task))
        if not self.stream.task_free:
            model.begin_task(task.classes, revisit=task.revisit, class_names=self.stream.class_names(task.classes))
        if model.rehearses == "only":
            self._keep(task)
        if self.args.forward_transfer and not task.number and not getattr(model, "closed_form", False):
            known = [later for later in self.stream.tasks[1:] if set(later.classes) <= set(model.classes)]
            self.matrix.baseline = {later.number: self._measure(later, side=False).accuracy for later in known}
        self.progress.begun = True
        self._call("on_task_begin", task)

    def _trains(self, task: Task) -> bool:
        return any(p.requires_grad for p in self.model.parameters()) and self.model.trains_task(task.number)

    def _finish(self, task: Task) -> None:
        """What follows the training of a task and is taken again as a whole when the run is killed in it."""
        model = self.model
        if model.rehearses != "only":
            self._keep(task)
        with self.viewer.still():
            if model.needs_consolidation:
                memory = self.viewer.images(self.memory.rows) if self.memory is not None and len(self.memory) else None
                model.consolidate(self.viewer.task_images(task), memory)
            if self.side.classifiers:
                self.side.fit(self.viewer.task_images(task))
        if not self.stream.task_free:
            model.end_task()

    def _keep(self, task: Task) -> None:
        """Take the task's images into the memory; without tasks it takes them as they pass."""
        if self.memory is None or self.stream.task_free:
            return
        stream = require_indexed(self.stream, "rehearsal")
        rows, ranking = stream.tasks[task.number].train_rows, None
        if hasattr(self.model, "rank_images"):  # the learner chooses which
            with self.viewer.still():
                ranking = self.model.rank_images(rows, self.viewer.images(rows))
        self.memory.add(rows, stream.train_labels[rows], ranking)

    # ---- training ----------------------------------------------------------------------------------------------------

    def steps_of(self, task: Task) -> int:
        """Optimizer steps that a `task` takes."""
        return self.args.epochs * self._steps_per_epoch(task)

    def steps_done(self, task: Task) -> int:
        """Optimizer steps of the `task` that is being learnt."""
        return self.progress.epoch * self._steps_per_epoch(task) + self.progress.step

    def _steps_per_epoch(self, task: Task) -> int:
        rows = self._rows()
        if rows is None:
            return self.stream.steps_per_epoch(task, self.args.batch_size)
        return require_indexed(self.stream, "rehearsal").steps_per_epoch(task, self.args.batch_size, rows)

    def frozen_features(self, *, train: bool) -> Tensor:
        """Un-prompted features of all training (`train`) or test images by row number [rows, D].

        Where the base is frozen they are computed once.
        """
        return self.viewer.frozen_features(train=train)

    def _train(self, task: Task, before: dict[str, Any], saved: Saved | None) -> None:
        args, progress, model, accelerator = self.args, self.progress, self.model, self.accelerator
        optimizer = build_optimizer(args.optimizer, model.parameter_groups(args.lr, **args.lrs), **args.optimizer_options)
        if args.keep_optimizer and self.optimizer is not None:
            keep_state(self.optimizer, before, optimizer, dict(model.named_parameters()))
        if saved is not None:
            put_back_optimizer(self, optimizer, saved)
        self.optimizer = optimizer
        model.attach_optimizer(optimizer)
        wrapped, prepared = accelerator.prepare(model, optimizer)
        wrapped.train()
        # Now, so that neither the bar nor the speed of the first steps shows these passes.
        for epoch in range(args.epochs):
            self.viewer.training_queries(epoch)
        self.viewer.queries(train=False)
        self._window = (0, time.perf_counter())
        steps, per_epoch = self.steps_of(task), self._steps_per_epoch(task)
        while progress.epoch < args.epochs:
            self._call("on_epoch_begin", task, progress.epoch)
            for batch in self._batches(task):
                self._call("on_step_begin", task)
                step = progress.epoch * per_epoch + progress.step
                set_rates(optimizer, rate_factor(args.schedule, step, steps, args.warmup, progress.epoch, args.epochs))
                parts = self._step(wrapped, prepared, batch)
                self._remember(batch)
                progress.step += 1
                progress.global_step += 1
                self._call("on_step_end", task)
                if progress.global_step % args.log_every == 0:
                    self._log(parts, optimizer, task)
                if args.checkpoint_every and progress.global_step % args.checkpoint_every == 0:
                    self._save()
            self._call("on_epoch_end", task, progress.epoch)
            progress.epoch, progress.step = progress.epoch + 1, 0
        model.check_labels()
        if args.checkpoint_every:
            self._save()
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        for left in ("forward", "_is_accelerate_prepared"):
            # Accelerate would take the model for a prepared one and train the next task without mixed precision.
            vars(model).pop(left, None)
        accelerator.free_memory()

    def _batches(self, task: Task) -> Iterator[dict[str, Any]]:
        """The rest of the current epoch's global batches, this process's share of each."""
        args, progress = self.args, self.progress
        options: dict[str, Any] = {
            "seed": args.seed,
            "epoch": progress.epoch,
            "num_workers": args.workers,
            "start": progress.step,
        }
        if isinstance(self.stream, IndexedStream):
            options |= {
                "queries": self.viewer.training_queries(progress.epoch),
                "rows": self._rows(),
                "memory_rows": self._remembered(),
                "memory_batch_size": args.batch_size if args.memory_batch_size is None else args.memory_batch_size,
            }
        return iter(self.stream.train_batches(task, args.batch_size, **options))

    def _remembered(self) -> Rows | Callable[[], Rows] | None:
        """Row numbers that join the batches: those of a task's start or, without tasks, those of the moment."""
        memory = self.memory
        if memory is None or self.model.rehearses != "beside":
            return None
        return (lambda: memory.rows) if self.stream.task_free else memory.rows

    def _step(self, wrapped: Any, optimizer: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """One optimizer step on a batch; the parts of its loss."""
        accelerator, args = self.accelerator, self.args
        parts: dict[str, Tensor] = {}
        shown = self.stream.augment_on_device(on_device(batch, accelerator.device), (args.seed, self.progress.epoch))
        pieces = micro_batches(shown, args.accumulation)
        images = (batch["labels"] != IGNORE_INDEX).sum().to(accelerator.device)
        # Pieces and processes are added up here, so each is told how many images there are in all.
        whole = {"num_items_in_batch": sum_over_processes(images)} if len(pieces) > 1 else {}
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            with accelerator.no_sync(wrapped) if not last else nullcontext():
                output = wrapped(**piece, **whole)
                loss = output.loss * world_size() if whole else output.loss
                accelerator.backward(loss)
            for name, value in {"loss": output.loss, **(output.losses or {})}.items():
                parts[name] = parts.get(name, 0) + value.detach()
        if args.clip:
            accelerator.clip_grad_norm_(wrapped.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        self._window = (self._window[0] + len(batch["labels"]) * world_size(), self._window[1])
        return parts

    def _remember(self, batch: dict[str, Any]) -> None:
        """Without tasks the memory takes images as they pass."""
        if self.memory is not None and self.stream.task_free:
            ids = torch.cat(gather_over_processes(torch.tensor(batch["sample_ids"], device=self.accelerator.device)))
            rows = ids[ids >= 0].cpu().numpy()
            rows = rows[~np.isin(rows, self.memory.rows)]  # not those that were rehearsed
            self.memory.observe(rows, require_indexed(self.stream, "rehearsal").train_labels[rows])

    def _log(self, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer, task: Task) -> None:
        self.model.check_labels()
        now = time.perf_counter()
        logs = {name: float(value) for name, value in parts.items()}
        if not all(math.isfinite(value) for value in logs.values()):
            raise FloatingPointError(
                f"the loss is {logs} in task {task.number}, epoch {self.progress.epoch}, step {self.progress.step}: lower "
                "the learning rate, or clip the gradient"
            )
        images, since = self._window
        self._window = (0, now)
        logs |= {"lr": optimizer.param_groups[0]["lr"], "images_per_second": images / max(now - since, 1e-9)}
        logs |= {"task": task.number, "epoch": self.progress.epoch}
        self.accelerator.log(logs, step=self.progress.global_step)
        self._call("on_log", logs)

    def _rows(self) -> Any:
        """Row numbers to train on, None for the task's own."""
        return self.memory.rows if self.memory is not None and self.model.rehearses == "only" else None

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def _measure(self, task: Task, *, side: bool = True) -> Evaluation:
        with self.viewer.still():
            return evaluate(
                self.model,
                self.viewer.test_batches(task),
                self.model.classes,
                self.accelerator.device,
                task=task.number,
                tasks=[t.classes for t in self.stream.tasks],
                classifiers=self.side.classifiers if side else None,
            )

    def _evaluate(self, task: Task) -> None:
        self.measured = [self._measure(seen) for seen in self.stream.tasks[: task.number + 1]]
        self.matrix.add(
            [m.accuracy for m in self.measured],
            [m.images for m in self.measured],
            [m.task_incremental for m in self.measured if m.task_incremental is not None],
        )
        self.side.add(self.measured)
        self.accelerator.log(
            {"task": task.number, "accuracies": [m.accuracy for m in self.measured], "average": self.matrix.curve()[-1]},
            step=self.progress.global_step,
        )
        self._call("on_evaluate", self.measured)

    # ---- checkpoints and callbacks -----------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint."""
        if self.checkpoints is None:
            return
        self.progress.seconds = time.perf_counter() - self._started
        tensors, values = taken(self)
        if self.accelerator.is_main_process:
            folder = self.checkpoints.save(self.progress.global_step + self.progress.task, tensors, values)
            for callback in self.callbacks:
                callback.on_save(self, folder)
        self.accelerator.wait_for_everyone()

    def _saved(self, resume: bool) -> Saved | None:
        """What to go on from; a run that starts over removes its earlier checkpoints."""
        if self.checkpoints is None:
            if resume:
                raise ValueError("resume needs the results folder of the run: set output_dir")
            return None
        saved = checked(self.checkpoints.latest(), self)
        if resume:
            return saved
        self.accelerator.wait_for_everyone()  # all have seen whose checkpoints they are
        if self.accelerator.is_main_process:
            self.checkpoints.clear()
        return None

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *arguments)
