"""What a training run ends with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cl_prompts.evaluation.evaluate import Evaluation
from cl_prompts.evaluation.metrics import AccuracyMatrix


@dataclass(frozen=True)
class TrainingResult:
    """What a run of `ContinualTrainer` ends with. It holds no model and no images.

    Args:
        matrix: accuracies of the learner.
        extra_matrices: accuracies of the extra classifiers, by name.
        evaluations: the newest evaluation, one for each task.
        settings: of the run, JSON-able: the trainer's arguments, and `scenario`, the stream's.
        trainable_parameters: number of parameters that the last task trained.
        seconds: training time over all sittings of a resumed run.
    """

    matrix: AccuracyMatrix
    extra_matrices: dict[str, AccuracyMatrix] = field(default_factory=dict)
    evaluations: list[Evaluation] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int = 0
    seconds: float = 0.0
