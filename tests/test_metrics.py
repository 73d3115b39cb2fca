"""Metrics against the published implementations (`golden/metrics.json`), and the table of a run."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_prompts.continual import AccuracyMatrix


GOLDEN = Path(os.environ.get("CL_PROMPTS_GOLDEN", Path(__file__).parent / "golden"))

NAMES = {
    "faa": "faa_macro",
    "caa": "caa_macro",
    "faa_micro": "faa_micro",
    "caa_micro": "caa_micro",
    "forgetting": "forgetting_max_including_final",
    "forgetting_before_final": "forgetting_max_before_final",
    "forgetting_step": "forgetting_mean_step_drop",
    "forgetting_first": "forgetting_first_minus_final",
    "bwt": "bwt",
    "learning_accuracy": "learning_accuracy",
}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    about: dict[str, Any] = json.loads((GOLDEN / "metrics.json").read_text())
    return about


def matrix_of(golden: dict[str, Any], tasks: int | None = None) -> AccuracyMatrix:
    table, matrix = golden["accuracy_matrix"], AccuracyMatrix()
    for j in range(len(table) if tasks is None else tasks):
        matrix.add([table[i][j] for i in range(j + 1)], golden["test_images_per_task"][: j + 1])
    return matrix


def exactly(value: Any) -> Any:
    return pytest.approx(value, abs=1e-12, rel=0)


def test_measures(golden: dict[str, Any]) -> None:
    summary = matrix_of(golden).summary()
    assert summary == {ours: exactly(golden["expected"][theirs]) for ours, theirs in NAMES.items()}


def test_curves_and_measures_after_each_task(golden: dict[str, Any]) -> None:
    expected = golden["expected"]
    assert matrix_of(golden).curve() == exactly(expected["stage_accuracy_macro"])
    assert matrix_of(golden).curve(micro=True) == exactly(expected["stage_accuracy_micro"])
    stages = [matrix_of(golden, tasks).summary() for tasks in range(2, len(golden["accuracy_matrix"]) + 1)]
    assert [s["forgetting"] for s in stages] == exactly(expected["stage_forgetting_max_including_final"])
    assert [s["bwt"] for s in stages] == exactly(expected["stage_bwt"])


def test_forgetting_is_taken_from_the_best_accuracy_ever() -> None:
    """Task 0: 50, then 90, then 60. Four numbers are called forgetting, and this tells them apart."""
    matrix = AccuracyMatrix()
    matrix.add([50], [10])
    matrix.add([90, 70], [10, 30])
    matrix.add([60, 80, 100], [10, 30, 10])
    summary = matrix.summary()
    assert summary["forgetting"] == exactly((30 + 0) / 2)
    assert summary["forgetting_before_final"] == exactly((30 - 10) / 2)
    assert summary["forgetting_step"] == exactly((-40 + (30 - 10) / 2) / 2)
    assert summary["forgetting_first"] == exactly((-10 - 10) / 2)
    assert summary["faa"] == exactly(80)
    assert summary["faa_micro"] == exactly((600 + 2400 + 1000) / 50)
    assert summary["caa"] == exactly((50 + 80 + 80) / 3)


def test_one_task_and_none() -> None:
    with pytest.raises(ValueError, match="no task was evaluated yet"):
        AccuracyMatrix().summary()
    matrix = AccuracyMatrix()
    matrix.add([75.0], [4])
    summary = matrix.summary()
    assert all(summary[name] == 75 for name in ("faa", "caa", "faa_micro", "caa_micro", "learning_accuracy"))
    assert all(summary[name] == 0 for name in ("forgetting", "forgetting_step", "forgetting_first", "bwt"))


def test_a_column_of_the_wrong_length_changes_nothing() -> None:
    matrix = AccuracyMatrix()
    matrix.add([75.0], [4])
    for accuracies, sizes in (([70.0], [4]), ([70.0, 80.0, 90.0], [4, 4, 4]), ([70.0, 80.0], [4])):
        with pytest.raises(ValueError, match="column 1 needs 2 accuracies and sizes"):
            matrix.add(accuracies, sizes)
    assert (matrix.columns, matrix.sizes) == ([[75.0]], [4])


def test_table_and_json(golden: dict[str, Any]) -> None:
    matrix = matrix_of(golden)
    table, expected = matrix.table(), np.array(golden["accuracy_matrix"])
    seen = np.triu(np.ones_like(expected, dtype=bool))
    assert np.array_equal(table[seen], expected[seen])
    assert np.isnan(table[~seen]).all()
    saved = json.loads(json.dumps(matrix.to_dict()))
    assert AccuracyMatrix(saved["columns"], saved["sizes"]).summary() == matrix.summary()
    assert all(math.isfinite(saved[name]) for name in NAMES)
