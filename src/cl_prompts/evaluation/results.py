"""The result of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.evaluation.metrics import AccuracyMatrix


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run of `ContinualTrainer`, without model and images.

    Args:
        matrix: accuracies of the learner.
        extra_matrices: accuracies of the extra classifiers, by name.
        evaluations: results of the last evaluation, one per task.
        settings: settings of the run, JSON-able: the trainer's arguments, and the stream's `scenario`.
        trainable_parameters: number of parameters trained in the last task.
        seconds: training time, including that before a resume.
    """

    matrix: AccuracyMatrix
    extra_matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    seconds: float = 0.0
