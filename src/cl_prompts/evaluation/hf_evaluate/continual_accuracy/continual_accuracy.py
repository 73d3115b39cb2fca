"""Continual-learning accuracy and forgetting for `evaluate`: a thin wrapper over `cl_prompts.evaluation.metrics`.

`evaluate.load` scans the imports of this file, docstrings included: one module on a line.
"""

from typing import Any

import datasets
import evaluate

from cl_prompts.evaluation.metrics import matrix_from_predictions


DESCRIPTION = """
Accuracy over a sequence of tasks: final (faa) and mean (caa) average accuracy, over tasks and over images (_micro),
accuracy when just learned, backward transfer, and four definitions of forgetting. All in percent.
"""

INPUTS = """
Args:
    predictions: predicted class of each image.
    references: class of each image; negative: padding, which is ignored.
    task_ids: number of each image's task, from 0.
    after_task: number of the task after whose training the prediction was made; predictions for all tasks so far are needed
        after each task.
Returns:
    the measures of `AccuracyMatrix.summary`.
Example:
    >>> metric = evaluate.load(path_of("continual_accuracy"))
    >>> metric.add_batch(predictions=[0, 1], references=[0, 1], task_ids=[0, 0], after_task=[0, 0])
    >>> metric.add_batch(predictions=[0, 2], references=[0, 1], task_ids=[0, 0], after_task=[1, 1])
    >>> metric.add_batch(predictions=[2, 3], references=[2, 3], task_ids=[1, 1], after_task=[1, 1])
    >>> metric.compute()["forgetting"]
    50.0
"""

CITATION = """
@inproceedings{lopezpaz2017gradient,
  title={Gradient Episodic Memory for Continual Learning},
  author={Lopez-Paz, David and Ranzato, Marc'Aurelio},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""


class ContinualAccuracy(evaluate.Metric):
    """The measures of an accuracy matrix, from single predictions in any order."""

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", "task_ids", "after_task")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({name: datasets.Value("int64") for name in columns}),
        )

    def _compute(self, **answers: Any) -> dict[str, float]:
        return matrix_from_predictions(**answers).summary()
