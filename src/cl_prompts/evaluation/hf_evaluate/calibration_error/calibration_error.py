"""Expected calibration error for `evaluate`: a thin wrapper over `cl_prompts.evaluation.calibration`.

`evaluate.load` scans the imports of this file, docstrings included: one module on a line.
"""

from typing import Any

import datasets
import evaluate

from cl_prompts.evaluation.calibration import Reliability


DESCRIPTION = """
How far the confidence of answers is from their accuracy: expected calibration error over bins of the confidence, in
percent, and mean negative log likelihood, in nats.
"""

INPUTS = """
Args:
    predictions: probabilities of the classes of each image.
    references: index of each image's class.
    bins: number of bins of equal width; default 15.
Returns:
    expected_calibration_error, negative_log_likelihood.
Example:
    >>> metric = evaluate.load(path_of("calibration_error"))
    >>> metric.add_batch(predictions=[[0.75, 0.25], [0.75, 0.25]], references=[0, 1])
    >>> metric.compute()["expected_calibration_error"]
    25.0
"""

CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
"""


class CalibrationError(evaluate.Metric):
    """Expected calibration error and negative log likelihood, from probabilities."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, bins: int = 15) -> dict[str, float]:
        found = Reliability.of(predictions, references, bins)
        return {
            "expected_calibration_error": found.expected_calibration_error,
            "negative_log_likelihood": found.negative_log_likelihood,
        }
