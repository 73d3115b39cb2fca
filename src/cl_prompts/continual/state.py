"""The state of a run as callbacks see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_prompts.continual.arguments import ContinualArguments
from cl_prompts.continual.progress import Progress
from cl_prompts.continual.rehearsal import RehearsalMemory
from cl_prompts.continual.streams.stream import Stream
from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.learner.protocol import Learner


@dataclass(frozen=True)
class TrainerState:
    """The state of a run at one event: what the callbacks of transformers get as `args`, `state`, `model`, `optimizer`.

    Args:
        args: settings of the run.
        model: the learner, not wrapped.
        optimizer: of the task that is being trained, or the last one; None before the first.
        stream: the tasks.
        progress: a copy of the position in the stream.
        steps_per_epoch: optimizer steps of an epoch of the task that is being trained; 0 outside training.
        matrix: accuracies so far.
        evaluations: the newest evaluation, one for each task seen.
        memory: the rehearsed images; None without rehearsal.
    """

    args: ContinualArguments
    model: Learner
    optimizer: torch.optim.Optimizer | None
    stream: Stream
    progress: Progress
    steps_per_epoch: int
    matrix: AccuracyMatrix
    evaluations: list[Evaluation]
    memory: RehearsalMemory | None

    @property
    def task_steps(self) -> int:
        """Optimizer steps of the task that is being trained."""
        return self.args.num_train_epochs * self.steps_per_epoch

    @property
    def task_steps_done(self) -> int:
        """Those of them that are done."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step
