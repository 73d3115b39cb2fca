"""Metrics against the published implementations (`golden/metrics.json`) and plain loops; files that hold them."""

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import TESTS

from cl_prompts.continual import AccuracyMatrix
from cl_prompts.evaluation.metrics import matrix_from_predictions


GOLDEN = Path(os.environ.get("CL_PROMPTS_GOLDEN", TESTS / "golden"))

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


# ---- forward transfer, the task known at test


def test_forward_transfer() -> None:
    """Mean over later tasks of accuracy before training minus baseline, the first task left out (GEM's FWT)."""
    matrix = AccuracyMatrix()
    matrix.add([80], [10])
    matrix.before[1] = 40.0
    matrix.add([70, 90], [10, 10])
    assert matrix.summary()["accuracy_before"] == 40
    matrix.before[2] = 55.0
    matrix.baseline.update({0: 99.0, 1: 10.0})
    assert "fwt" in matrix.summary()
    matrix.add([60, 85, 95], [10, 10, 10])
    assert "fwt" not in matrix.summary()  # task 2 has no baseline
    matrix.baseline[2] = 15.0
    assert matrix.summary()["fwt"] == exactly((40 - 10 + 55 - 15) / 2)
    assert matrix.summary()["accuracy_before"] == exactly((40 + 55) / 2)
    del matrix.before[1]
    assert not {"fwt", "accuracy_before"} & matrix.summary().keys()


def test_task_incremental_columns(golden: dict[str, Any]) -> None:
    """The golden matrix as task-incremental columns beside another one gives the golden numbers."""
    table, sizes, matrix = golden["accuracy_matrix"], golden["test_images_per_task"], AccuracyMatrix()
    for j in range(len(table)):
        matrix.add([1.0] * (j + 1), sizes[: j + 1], [table[i][j] for i in range(j + 1)])
    summary = matrix.summary()
    for ours in ("faa", "caa", "forgetting"):
        assert summary[f"{ours}_task_incremental"] == exactly(golden["expected"][NAMES[ours]])
    assert summary["faa"] == 1
    with pytest.raises(ValueError, match="for every column or for none"):
        matrix.add([1.0] * 6, [*sizes, 3])


# ---- properties


@st.composite
def matrices(draw: st.DrawFn) -> AccuracyMatrix:
    tasks = draw(st.integers(1, 5))
    percent = st.floats(0, 100)
    sizes = draw(st.lists(st.integers(1, 999), min_size=tasks, max_size=tasks))
    known = draw(st.booleans())
    matrix = AccuracyMatrix()
    for j in range(tasks):
        columns = [draw(st.lists(percent, min_size=j + 1, max_size=j + 1)) for _ in range(1 + known)]
        matrix.add(columns[0], sizes[: j + 1], columns[1] if known else None)
    numbers = st.dictionaries(st.integers(0, tasks - 1), percent)
    matrix.before, matrix.baseline = draw(numbers), draw(numbers)
    return matrix


@settings(deadline=None)
@given(matrices())
def test_properties(matrix: AccuracyMatrix) -> None:
    summary = matrix.summary()
    last = matrix.columns[-1]
    assert summary["forgetting"] >= 0
    assert summary["forgetting"] >= summary["forgetting_before_final"] - 1e-9
    assert summary["forgetting"] >= summary["forgetting_first"] - 1e-9
    assert summary["forgetting_first"] == -summary["bwt"]
    for name in ("faa", "faa_micro"):
        assert min(last) - 1e-9 <= summary[name] <= max(last) + 1e-9
    everything = [a for column in matrix.columns for a in column]
    for name in ("caa", "caa_micro", "learning_accuracy"):
        assert min(everything) - 1e-9 <= summary[name] <= max(everything) + 1e-9
    alike = AccuracyMatrix(matrix.columns, [7] * len(matrix.columns)).summary()
    assert alike["faa_micro"] == pytest.approx(summary["faa"], abs=1e-9)
    assert ("fwt" in summary) <= ("accuracy_before" in summary)
    assert all(math.isfinite(value) for value in summary.values())


@settings(max_examples=30, deadline=None)
@given(matrices())
def test_json_and_csv_hold_the_matrix_exactly(matrix: AccuracyMatrix) -> None:
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))) == matrix
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "deeper", "matrix.csv")
        matrix.to_csv(file)
        assert AccuracyMatrix.from_csv(file) == matrix
        assert [path.name for path in file.parent.iterdir()] == ["matrix.csv"]


def test_csv(tmp_path: Path) -> None:
    AccuracyMatrix().to_csv(tmp_path / "empty.csv")
    assert AccuracyMatrix.from_csv(tmp_path / "empty.csv") == AccuracyMatrix()
    matrix = AccuracyMatrix()
    matrix.add([75.5], [4], [80])
    matrix.before[1] = 12.5
    matrix.add([50, 100 / 3], [4, 6], [75, 100])
    matrix.to_csv(tmp_path / "matrix.csv")
    assert (tmp_path / "matrix.csv").read_text().splitlines() == [
        "task,images,after_0,after_1,task_incremental_after_0,task_incremental_after_1,before",
        "0,4,75.5,50.0,80.0,75.0,",
        "1,6,,33.333333333333336,,100.0,12.5",
    ]


# ---- bad input


@pytest.mark.parametrize("value", [-0.5, 100.5, math.nan, math.inf])
def test_what_is_no_accuracy(value: float) -> None:
    matrix = AccuracyMatrix()
    for columns in (([value], [4]), ([50.0], [4], [value])):
        with pytest.raises(ValueError, match="is no accuracy in percent"):
            matrix.add(*columns)
    assert matrix == AccuracyMatrix()


def test_test_sets_that_change() -> None:
    matrix = AccuracyMatrix()
    for size in (0, -3, 2.5):
        with pytest.raises(ValueError, match="must be numbers of test images"):
            matrix.add([50.0], [size])  # type: ignore[list-item]
    matrix.add([50.0], [4])
    with pytest.raises(ValueError, match=r"earlier tasks had \[4\] test images, now \[5\]"):
        matrix.add([50.0, 60.0], [5, 4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("columns"), "columns"),
        (lambda v: v["columns"].pop(), "1 columns, 2 task-incremental ones, 2 sizes"),
        (lambda v: v["columns"][1].pop(), "column 1 needs 2 accuracies"),
        (lambda v: v["columns"][1].__setitem__(0, "fifty"), "fifty"),
        (lambda v: v["columns"][1].__setitem__(0, None), "NoneType"),
        (lambda v: v.update(sizes=3), "int"),
        (lambda v: v.update(task_incremental=[[1.0]]), "2 columns, 1 task-incremental ones"),
        (lambda v: v.update(before={"1": 101}), "before of task 1: 101 is no accuracy"),
    ],
)
def test_damaged_matrices(change: Any, message: str) -> None:
    matrix = AccuracyMatrix()
    matrix.add([50.0], [4], [60.0])
    matrix.add([50.0, 70.0], [4, 4], [60.0, 80.0])
    values = matrix.to_dict()
    change(values)
    with pytest.raises(ValueError, match="this is no accuracy matrix") as found:
        AccuracyMatrix.from_dict(values)
    assert message in str(found.value)


@pytest.mark.parametrize("text", ["", "task,images,after_1\n0,4,50.0\n", "task,images,after_0\n0,4,many\n"])
def test_damaged_tables(text: str, tmp_path: Path) -> None:
    file = tmp_path / "matrix.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"matrix.csv is no accuracy matrix"):
        AccuracyMatrix.from_csv(file)


# ---- single answers


def test_matrix_of_single_answers() -> None:
    """Against counting in plain loops; the order of answers does not matter, padding does not count."""
    rng = np.random.default_rng(0)
    answers = []
    counts: dict[tuple[int, int], list[int]] = {}
    for after in range(3):
        for task in range(after + 1):
            for _ in range(5 + task):
                wanted, predicted = int(rng.integers(3)), int(rng.integers(3))
                answers.append((predicted, wanted, task, after))
                counts.setdefault((task, after), []).append(predicted == wanted)
            answers.append((0, -100, task, after))
    answers = [answers[i] for i in rng.permutation(len(answers))]
    matrix = matrix_from_predictions(*zip(*answers, strict=True))
    assert matrix.sizes == [5, 6, 7]
    for (task, after), hits in counts.items():
        assert matrix.columns[after][task] == exactly(100 * sum(hits) / len(hits))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (([1], [1], [0], [0, 0]), r"alike in length, got \[1, 1, 1, 2\]"),
        (([], [], [], []), "there are no predictions"),
        (([1], [-100], [0], [0]), "there are no predictions"),
        (([1], [1], [1], [0]), "later tasks are unseen"),
        (([1], [1], [-1], [0]), "numbers of tasks from 0"),
        (([1, 1], [1, 1], [0, 1], [0, 1]), r"after task 1 there are no predictions for tasks \[0\]"),
        (([1], [1], [0], [1]), r"after task 0 there are no predictions for tasks \[0\]"),
    ],
)
def test_answers_that_make_no_matrix(answers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix_from_predictions(*answers)
