"""Evaluations of a run: on one task, on all tasks seen, and of seen tasks against tasks to come."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_prompts.continual.extra_classifiers import ExtraClassifiers
from cl_prompts.continual.feature_cache.provider import FeatureProvider
from cl_prompts.continual.streams.stream import Stream, Task
from cl_prompts.evaluation.evaluate import Evaluation, evaluate, novelty_of
from cl_prompts.evaluation.novelty import NoveltyMeasures
from cl_prompts.learner.protocol import Learner


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a learner on the test images of a stream.

    Args:
        model: the learner.
        stream: the stream.
        provider: of its test images.
        device: of the learner.
        extra: classifiers that are evaluated on the same features.
        earlier_tasks: number of tasks that the learner knew before those of the stream.
        novelty: whether to tell images of seen tasks from those of tasks to come.
    """

    model: Learner
    stream: Stream
    provider: FeatureProvider
    device: torch.device
    extra: ExtraClassifiers
    earlier_tasks: int
    novelty: bool

    def on_task(self, task: Task, *, extra: bool = True) -> Evaluation:
        """Evaluate on a task that has known classes; `extra`: also the further classifiers."""
        return self._evaluate(task, known=True, extra=extra)

    def on_seen(self, task: Task) -> list[Evaluation]:
        """Evaluate on all tasks up to `task`."""
        return [self.on_task(seen) for seen in self.stream.tasks[: task.number + 1]]

    def against_later(self, task: Task, seen: list[Evaluation]) -> NoveltyMeasures | None:
        """Measures of the novelty score after a task.

        Args:
            task: the newest task.
            seen: evaluations on all tasks up to it.

        Returns:
            None if they were not asked for, or no later task has only unknown classes.
        """
        if not self.novelty:
            return None
        known = set(self.model.classes)
        later = [later for later in self.stream.tasks[task.number + 1 :] if not known & set(later.classes)]
        to_come = [self._evaluate(one, known=False, extra=False) for one in later]
        return novelty_of(seen, to_come, self.model.novelty_threshold)

    def _evaluate(self, task: Task, *, known: bool, extra: bool) -> Evaluation:
        with self.provider.eval_mode():
            return evaluate(
                self.model,
                self.provider.test_batches(task),
                self.model.classes,
                self.device,
                task=task.number if known else None,
                tasks=[t.classes for t in self.stream.tasks],
                earlier_tasks=self.earlier_tasks,
                classifiers=self.extra.classifiers if extra else None,
                novelty=self.novelty,
            )
