"""Expected calibration error, negative log likelihood and the reliability of a run."""

import json
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest

from cl_prompts.evaluation.calibration import Reliability, expected_calibration_error, negative_log_likelihood
from cl_prompts.evaluation.hf_evaluate import path_of
from cl_prompts.evaluation.metrics import AccuracyMatrix
from cl_prompts.evaluation.plots import draw


def drawn(images: int = 500, classes: int = 4, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.full(classes, 0.5), images)
    return table, rng.integers(0, classes, images)


def test_the_error_is_that_of_its_definition() -> None:
    table, labels = drawn()
    confidence, hits = table.max(1), table.argmax(1) == labels
    wanted = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            wanted += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(table, labels) == pytest.approx(100 * wanted)
    assert negative_log_likelihood(table, labels) == pytest.approx(-np.log(table[np.arange(500), labels]).mean())
    assert expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert expected_calibration_error(np.eye(3), [1, 2, 0]) == 100


def test_the_error_by_chance_is_that_of_answers_drawn_from_the_confidences() -> None:
    table, _ = drawn(90)
    rng, errors = np.random.default_rng(0), []
    for _ in range(400):
        labels = [int(rng.choice(4, p=row)) for row in table]
        errors.append(expected_calibration_error(table, labels))
    assert Reliability.of(table, labels).calibration_error_by_chance == pytest.approx(np.mean(errors), rel=0.04)
    assert Reliability.of(np.eye(3), [0, 1, 2]).calibration_error_by_chance == 0


def test_parts_add_up() -> None:
    table, labels = drawn()
    whole = Reliability.of(table, labels)
    total = Reliability.total([Reliability.of(table[:200], labels[:200]), Reliability.of(table[200:], labels[200:])])
    assert (total.images, total.hits) == (whole.images, whole.hits)
    assert total.expected_calibration_error == pytest.approx(whole.expected_calibration_error)
    assert Reliability.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


@pytest.mark.parametrize(
    ("table", "labels", "message"),
    [
        ([0.5, 0.5], [0], "are needed"),
        ([[0.5, 0.5]], [2], "from 0 to 1"),
        ([[0.5, 0.9]], [0], "the sum 1"),
        ([[float("nan"), 1.0]], [0], "the sum 1"),
    ],
)
def test_what_is_no_probability_is_refused(table: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reliability.of(table, labels)


def test_the_matrix_keeps_it_and_the_plot_shows_it(tmp_path: Path) -> None:
    matrix, parts = AccuracyMatrix(), [Reliability.of(*drawn(seed=seed)) for seed in (1, 2)]
    for number, part in enumerate(parts, start=1):
        matrix.add([50.0] * number, [250] * number, reliability=part)
    summary = matrix.summary()
    errors = [part.expected_calibration_error for part in parts]
    assert (summary["ece"], summary["ece_largest"]) == (errors[1], max(errors))
    assert summary["nll"] == parts[1].negative_log_likelihood
    assert AccuracyMatrix.from_dict(json.loads(json.dumps(matrix.to_dict()))) == matrix
    assert {file.name for file in draw({"one": matrix}, tmp_path)} == {"curves.png", "matrix.png", "reliability.png"}
    with pytest.raises(ValueError, match="give reliability for every column or for none"):
        matrix.add([50.0] * 3, [250] * 3)
    damaged = matrix.to_dict()
    damaged["reliability"][0]["hits"][14] = 10**6
    with pytest.raises(ValueError, match="more hits"):
        AccuracyMatrix.from_dict(damaged)


def test_the_evaluate_module(tmp_path: Path) -> None:
    table, labels = drawn()
    metric = evaluate.load(path_of("calibration_error"), cache_dir=str(tmp_path))
    metric.add_batch(predictions=table.tolist(), references=labels)
    found = metric.compute()
    assert found["expected_calibration_error"] == pytest.approx(expected_calibration_error(table, labels))
    assert found["negative_log_likelihood"] == pytest.approx(negative_log_likelihood(table, labels))
