"""The state of a run that callbacks get."""

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
    """The state of a run at one event. Callbacks of transformers get these as `args`, `state`, `model`, `optimizer`.

    Args:
        args: settings of the run.
        model: the learner, not wrapped.
        optimizer: optimizer of the current or last task; None before the first task.
        stream: the stream.
        progress: a copy of the position in the stream.
        steps_per_epoch: optimizer steps per epoch of the current task; 0 outside training.
        matrix: accuracies so far.
        evaluations: results of the last evaluation, one entry per task seen.
        memory: the rehearsal memory; None without rehearsal.
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
        """Number of optimizer steps of the current task; 0 outside training."""
        steps = self.args.num_train_epochs * self.steps_per_epoch
        return min(steps, self.args.max_steps or steps)

    @property
    def task_steps_done(self) -> int:
        """Number of optimizer steps of the current task so far."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step
