"""The trainer: a `Learner` learns a stream of tasks, on one or many devices with Accelerate. A killed run is resumed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cl_prompts.continual.arguments import ContinualArguments, key_values
from cl_prompts.continual.batches import to_device
from cl_prompts.continual.callbacks import JsonlTracker, TrainerCallback
from cl_prompts.continual.checkpointing.checkpoint import Checkpoints
from cl_prompts.continual.checkpointing.parts import LearnerState, OptimizerState, RandomState, SkippedImages, Stateful
from cl_prompts.continual.checkpointing.snapshot import capture, restore, run_identity, validate
from cl_prompts.continual.evaluator import Evaluator
from cl_prompts.continual.extra_classifiers import ExtraClassifiers
from cl_prompts.continual.feature_cache.provider import FeatureProvider
from cl_prompts.continual.optimization import build_optimizer, keep_state, prepare, rate_factor, release, set_rates
from cl_prompts.continual.progress import Progress
from cl_prompts.continual.rehearsal import RehearsalMemory
from cl_prompts.continual.replay import Replay
from cl_prompts.continual.run_checks import check_engine, check_run, warn_of_slow_bf16
from cl_prompts.continual.run_lock import run_lock
from cl_prompts.continual.state import TrainerState
from cl_prompts.continual.streams.indexed import IndexedStream
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.continual.training_step import Throughput, global_logs, training_step
from cl_prompts.evaluation.evaluate import Evaluation, reliability_of
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.evaluation.results import TrainingResult
from cl_prompts.heads import FeatureClassifier
from cl_prompts.learner.protocol import Learner
from cl_prompts.runtime.memory import freed_memory_kept


class ContinualTrainer:
    """Trains a model task after task and evaluates it after each task on all tasks seen.

    Args:
        model: a `PromptPoolModel` or a baseline, not wrapped. It may have learned other tasks before.
        stream: the stream.
        args: settings.
        accelerator: Accelerate's accelerator; None: a new one with `args.mixed_precision`.
        callbacks: called at the events of `TrainerCallback`.
        trackers: Accelerate's trackers besides the log in the results folder, for example ["tensorboard"].
        classifiers: new classifiers to fit and evaluate on the model's features (`extra_classifiers.matrices`).

    Attributes:
        matrix: class-incremental accuracies: the model does not get the task of an image.
        progress: position in the stream.
        evaluations: results of the last evaluation, one entry per task seen.
        memory: the rehearsal memory; None without rehearsal.
        extra_classifiers: the classifiers and their accuracies.
        earlier_tasks: number of tasks that the learner knew before this run.

    Raises:
        ValueError: the settings do not fit the model or the stream.
    """

    def __init__(
        self,
        model: Learner,
        stream: Stream,
        args: ContinualArguments,
        *,
        accelerator: Accelerator | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        trackers: Sequence[str] = (),
        classifiers: Mapping[str, FeatureClassifier] | None = None,
    ) -> None:
        self.model, self.stream, self.args = model, stream, args
        self.earlier_tasks = model.num_tasks
        self.folder = Path(args.output_dir) if args.output_dir else None
        self.log = JsonlTracker(self.folder) if self.folder else None
        self.accelerator = accelerator or Accelerator(mixed_precision=args.mixed_precision, project_dir=self.folder)
        check_engine(self.accelerator.distributed_type)
        warn_of_slow_bf16(self.accelerator)
        self.accelerator.log_with = [*trackers, *([self.log] if self.log else [])]
        self.checkpoints = Checkpoints(self.folder / "checkpoints") if self.folder else None
        self.callbacks, self.progress = list(callbacks), Progress()
        self.matrix = AccuracyMatrix(needs_task=model.needs_task)
        self.evaluations: list[Evaluation] = []
        self.memory: RehearsalMemory | None = None
        if args.rehearses:
            self.memory = RehearsalMemory(args.memory_size or None, args.memory_per_class or None, seed=args.seed)
        self.extra_classifiers = ExtraClassifiers(model, classifiers or {})
        self.optimizer: torch.optim.Optimizer | None = None
        self.model.to(self.accelerator.device)
        self.feature_provider = FeatureProvider(model, stream, args, self.accelerator)
        novelty = args.novelty and not stream.task_free
        learned = (self.extra_classifiers, self.earlier_tasks, novelty)
        self.evaluator = Evaluator(model, stream, self.feature_provider, self.accelerator.device, *learned)
        self.replay = Replay(self.memory, model, stream, self.feature_provider)
        self._steps_per_epoch = 0  # of the current task; 0 outside training
        self._equal_parameters: dict[str, tuple[int, int]] = {}  # see `prepare`
        check_run(model, stream, args, self.extra_classifiers.classifiers)

    @freed_memory_kept()
    def train(self, *, resume: bool = False) -> AccuracyMatrix:
        """Learn all tasks and return the accuracies. `result` returns the accuracies and more.

        Args:
            resume: continue from the newest intact checkpoint in the results folder, if there is one. The run ends with the
                parameters and accuracies of an uninterrupted one: bit-equal on the same machine with the same threads,
                processes and precision.

        Raises:
            ValueError: the checkpoints in the results folder are of another run, or this trainer has trained already.
            FloatingPointError: the loss, or a tensor that training changes, is no longer finite.
            FolderInUseError, OSError: another run uses the results folder; the disk is full.
        """
        if self.evaluations and not resume:
            raise ValueError("this trainer has trained already: make a new one, with a new model")
        with run_lock(self.folder, self.accelerator):
            self._train_tasks(resume)
        return self.matrix

    def _train_tasks(self, resume: bool) -> None:
        saved = self._saved(resume)
        if saved is not None:
            self._restore(saved)
        elif self.log is not None:
            self.log.load_state_dict({"lines": 0})
        self.accelerator.init_trackers("cl_prompts", config=None)
        self._started = time.perf_counter() - self.progress.seconds
        if saved is not None:
            # Last, because restoring and starting the trackers may draw random numbers.
            restore({"random": self._random_state()}, saved, self.folder)
        self._call("on_train_begin")
        for task in self.stream.tasks[self.progress.task :]:
            self._learn(task)
        if not self.evaluations:  # a complete run was resumed
            self.evaluations = self.evaluator.on_seen(self.stream.tasks[-1])
        self._call("on_train_end")
        for tracker in self.accelerator.trackers:
            tracker.finish()  # accelerator.end_training would also destroy the process group, which the caller may need

    def result(self) -> TrainingResult:
        """Accuracies, evaluations and settings of the run so far."""
        return TrainingResult(
            matrix=self.matrix,
            extra_matrices=self.extra_classifiers.matrices,
            evaluations=self.evaluations,
            settings=self.args.to_dict() | {"scenario": self.stream.scenario},
            trainable_parameters=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            seconds=self.progress.seconds,
        )

    def _learn(self, task: Task) -> None:
        """Learn and evaluate one task from the current position, and write its checkpoint."""
        progress = self.progress
        resumed = progress.begun
        before = dict(self.model.named_parameters()) if self.args.keep_optimizer else {}
        if not resumed:
            self._begin(task)
        trains = self.model.trains_task(self.earlier_tasks + task.number)
        if trains and any(p.requires_grad for p in self.model.parameters()):
            self._train(task, (self.optimizer if resumed else None) or self._next_optimizer(before))
        self._finish(task)
        self._evaluate_seen(task)
        progress.task, progress.begun, progress.epoch, progress.step = task.number + 1, False, 0, 0
        self._call("on_task_end", task)
        self._save()

    def _begin(self, task: Task) -> None:
        model = self.model
        if self.args.forward_transfer and task.number and set(task.classes) <= set(model.classes):
            self.matrix.before[task.number] = self.evaluator.on_task(task, extra=False).accuracy
        if self.earlier_tasks + task.number:
            with self.feature_provider.eval_mode():
                if model.needs_features_before:
                    model.record_features(self.feature_provider.task_images(task))
                if self.extra_classifiers.classifiers:
                    self.extra_classifiers.record(self.feature_provider.task_images(task))
        names = self.stream.class_names(model.classes if self.stream.task_free else task.classes)
        if self.stream.task_free:
            model.name_classes(names)
        else:
            model.begin_task(task.classes, revisit=task.revisit or self.earlier_tasks > 0, class_names=names)
        self.replay.begin_task(task)
        if self.args.forward_transfer and not task.number and not model.closed_form:
            known = [later for later in self.stream.tasks[1:] if set(later.classes) <= set(model.classes)]
            self.matrix.baseline = {later.number: self.evaluator.on_task(later, extra=False).accuracy for later in known}
        self.progress.begun = True
        self._call("on_task_begin", task)

    def _finish(self, task: Task) -> None:
        """The steps after a task's training. A run killed within them repeats all of them."""
        model, provider = self.model, self.feature_provider
        self.replay.end_task(task)
        with provider.eval_mode():
            if model.needs_consolidation or (model.calibrates and isinstance(self.stream, IndexedStream)):
                memory = provider.images(self.memory.rows) if self.memory is not None and len(self.memory) else None
                model.consolidate(provider.task_images(task), memory)
            if self.extra_classifiers.classifiers:
                self.extra_classifiers.fit(provider.task_images(task))
        if model.drift_explained is not None:
            self.matrix.drift[task.number] = model.drift_explained
        if not self.stream.task_free:
            model.end_task()

    # ---- training ----------------------------------------------------------------------------------------------------

    def _new_optimizer(self) -> torch.optim.Optimizer:
        args = self.args
        defaults = {name: min(rate, args.learning_rate) for name, rate in self.model.default_rates.items()}
        rates = defaults | key_values("learning_rates", args.learning_rates)
        groups = self.model.parameter_groups(args.learning_rate, **rates)
        return build_optimizer(args.optim, groups, **key_values("optim_args", args.optim_args))

    def _next_optimizer(self, before: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer, with the last one's state if `keep_optimizer`; `before` has the parameters before the task."""
        optimizer = self._new_optimizer()
        if self.args.keep_optimizer and self.optimizer is not None:
            keep_state(self.optimizer, before, optimizer, dict(self.model.named_parameters()))
        return optimizer

    def _train(self, task: Task, optimizer: torch.optim.Optimizer) -> None:
        args, progress, model, accelerator = self.args, self.progress, self.model, self.accelerator
        self.optimizer = optimizer
        model.attach_optimizer(optimizer)
        wrapped, prepared = prepare(accelerator, model, optimizer, self._equal_parameters)
        wrapped.train()
        # Computed before the loop, so that progress bar and throughput do not include these passes.
        per_epoch = self._steps_per_epoch = self.replay.steps_per_epoch(task, args.batch_size)
        epochs = args.num_train_epochs
        begun = min(epochs, -(-args.max_steps // max(per_epoch, 1))) if args.max_steps else epochs
        for epoch in range(begun):
            self.feature_provider.training_queries(epoch)
        self.feature_provider.queries(train=False)
        self._throughput = Throughput()
        while progress.epoch < begun:
            self._call("on_epoch_begin", task, progress.epoch)
            for batch in self._batches(task):
                self._call("on_step_begin", task)
                step, steps = progress.epoch * per_epoch + progress.step, epochs * per_epoch
                schedule, warmup = args.lr_scheduler_type, args.warmup_steps
                set_rates(optimizer, rate_factor(schedule, step, steps, warmup, progress.epoch, epochs))
                losses = self._step(wrapped, prepared, batch)
                self.replay.observe(batch, accelerator.device)
                progress.step += 1
                progress.global_step += 1
                self._call("on_step_end", task)
                if progress.global_step % args.logging_steps == 0:
                    self._log(losses, optimizer, task)
                if args.save_steps and progress.global_step % args.save_steps == 0:
                    self._save()
            self._call("on_epoch_end", task, progress.epoch)
            progress.epoch, progress.step = progress.epoch + 1, 0
        model.check_labels()
        model.gather_statistics()
        model.check_finite()
        if args.save_steps:
            self._save()
        self._steps_per_epoch = 0
        release(accelerator, model, wrapped)

    def _step(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> dict[str, Tensor]:
        args, accelerator = self.args, self.accelerator
        images = self.stream.augment_on_device(to_device(batch, accelerator.device), (args.seed, self.progress.epoch))
        losses = training_step(
            wrapped,
            optimizer,
            images,
            accelerator,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
        )
        self._throughput.add(batch["labels"])
        return losses

    def _batches(self, task: Task) -> Iterator[dict[str, Any]]:
        """This process's share of the remaining batches of the current epoch."""
        args, progress = self.args, self.progress
        options: dict[str, Any] = {
            "seed": args.seed,
            "epoch": progress.epoch,
            "num_workers": args.dataloader_num_workers,
            "start": progress.step,
        }
        if isinstance(self.stream, IndexedStream):
            options |= {
                "queries": self.feature_provider.training_queries(progress.epoch),
                "rows": self.replay.rows(task),
                "memory_rows": self.replay.mixed_rows,
                "memory_batch_size": args.batch_size if args.memory_batch_size is None else args.memory_batch_size,
            }
        read = self.stream.train_batches(task, args.batch_size, **options)
        batches = iter(self.feature_provider.with_hidden(read, train=True, augmented=bool(self.stream.augmentation)))
        done = progress.epoch * self._steps_per_epoch + progress.step
        return islice(batches, max(args.max_steps - done, 0)) if args.max_steps else batches

    def _log(self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, task: Task) -> None:
        self.model.check_labels()
        logs = global_logs(losses, self._throughput, self.progress)
        logs |= {"learning_rate": optimizer.param_groups[0]["lr"], "task": task.number, "epoch": self.progress.epoch}
        self.accelerator.log(logs, step=self.progress.global_step)
        self._call("on_log", logs)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def _evaluate_seen(self, task: Task) -> None:
        """Evaluate all tasks up to `task` and add them to the matrices."""
        self.evaluations = self.evaluator.on_seen(task)
        accuracies = [e.accuracy for e in self.evaluations]
        known = [e.task_incremental for e in self.evaluations if e.task_incremental is not None]
        reliability = None if self.model.needs_task else reliability_of(self.evaluations)
        self.matrix.add(accuracies, [e.images for e in self.evaluations], known, reliability)
        self.extra_classifiers.add(self.evaluations)
        found = self.evaluator.against_later(task, self.evaluations)
        if found is not None:
            self.matrix.novelty[task.number] = found
        logs = {"task": task.number, "accuracies": accuracies, "average": self.matrix.curve()[-1]}
        self.accelerator.log(logs, step=self.progress.global_step)
        self._call("on_evaluate", self.evaluations)

    # ---- checkpoints and callbacks -----------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Stateful]:
        """The parts of a checkpoint, in the order in which they are restored."""
        parts: dict[str, Stateful] = {
            "learner": LearnerState(self.model),
            "progress": self.progress,
            "matrix": self.matrix,
            "extra_classifiers": self.extra_classifiers,
            "skipped": SkippedImages(self.stream, self.accelerator.device),
        }
        if self.memory is not None:
            parts["memory"] = self.memory
        if self.log is not None:
            parts["log"] = self.log
        if self.accelerator.scaler is not None:
            parts["scaler"] = self.accelerator.scaler
        return parts

    def _random_state(self) -> RandomState:
        return RandomState(self.accelerator.device, self.accelerator.process_index)

    def _identity(self) -> dict[str, str]:
        return run_identity(self.args, self.stream, self.model, self.extra_classifiers)

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """Restore all parts except the random state. The optimizer is built last, over the restored parameters."""
        restore(self._parts(), saved, self.folder)
        if "optimizer" in saved["parts"]:
            self.optimizer = self._new_optimizer()
            restore({"optimizer": OptimizerState(self.optimizer)}, saved, self.folder)

    def _save(self) -> None:
        """Write a checkpoint."""
        self.progress.seconds = time.perf_counter() - self._started
        if self.checkpoints is None:
            return
        parts = self._parts() | {"random": self._random_state()}
        if self.optimizer is not None and (self.progress.begun or self.args.keep_optimizer):
            parts["optimizer"] = OptimizerState(self.optimizer)
        state = capture(parts, self._identity())
        if self.accelerator.is_main_process:
            self._call("on_save", self.checkpoints.save(self.progress.global_step + self.progress.task, state))
        self.accelerator.wait_for_everyone()

    def _saved(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint to resume from, or None. Without `resume`, earlier checkpoints of this run are removed."""
        if self.checkpoints is None:
            if resume:
                raise ValueError("resume needs the results folder of the run: set output_dir")
            return None
        saved = self.checkpoints.latest()
        if saved is not None:
            validate(saved, self._identity(), self.folder)
        if resume:
            return saved
        self.accelerator.wait_for_everyone()  # every process has validated the checkpoints
        if self.accelerator.is_main_process:
            self.checkpoints.clear()
        return None

    def _state(self) -> TrainerState:
        return TrainerState(
            args=self.args,
            model=self.model,
            optimizer=self.optimizer,
            stream=self.stream,
            progress=replace(self.progress),
            steps_per_epoch=self._steps_per_epoch,
            matrix=self.matrix,
            evaluations=self.evaluations,
            memory=self.memory,
        )

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self._state(), *arguments)
