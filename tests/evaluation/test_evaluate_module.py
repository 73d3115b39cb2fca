"""The module for Hugging Face `evaluate`: it loads offline and gives the golden numbers."""

import json
import re
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from support.paths import TESTS

from cl_prompts.evaluation.hf_evaluate import FOLDER, path_of
from cl_prompts.evaluation.metrics import matrix_from_predictions


@pytest.fixture
def metric(tmp_path: Path) -> Any:
    return evaluate.load(path_of("continual_accuracy"), cache_dir=str(tmp_path))


def test_golden_numbers(metric: Any) -> None:
    """Each accuracy of the golden matrix as 10,000 answers; its numbers are multiples of 1/100 of a percent."""
    golden = json.loads((TESTS / "golden" / "metrics.json").read_text())
    table = golden["accuracy_matrix"]
    for after in range(len(table)):
        for task in range(after + 1):
            right = round(100 * table[task][after])
            answers = torch.ones(10_000, dtype=torch.int64)
            answers[:right] = 0
            same = torch.full_like(answers, task), torch.full_like(answers, after)
            metric.add_batch(
                predictions=answers, references=torch.zeros_like(answers), task_ids=same[0], after_task=same[1]
            )
    found, expected = metric.compute(), golden["expected"]
    for ours, theirs in {
        "faa": "faa_macro",
        "caa": "caa_macro",
        "forgetting": "forgetting_max_including_final",
        "forgetting_before_final": "forgetting_max_before_final",
        "forgetting_step": "forgetting_mean_step_drop",
        "forgetting_first": "forgetting_first_minus_final",
        "bwt": "bwt",
        "learning_accuracy": "learning_accuracy",
    }.items():
        assert found[ours] == pytest.approx(expected[theirs], abs=1e-12, rel=0)


def test_batches_lists_and_padding(metric: Any) -> None:
    """As `evaluate` is used: lists or arrays, batch by batch or at once; padding counts nowhere."""
    rng = np.random.default_rng(1)
    order = rng.permutation(63)
    answers = {
        "predictions": rng.integers(0, 3, 63),
        "references": np.where(order % 7 == 0, -100, rng.integers(0, 3, 63)),
        "task_ids": np.repeat([0, 0, 1], 21)[order],
        "after_task": np.repeat([0, 1, 1], 21)[order],
    }
    expected = matrix_from_predictions(**answers).summary()
    assert metric.compute(**answers) == expected
    for start in range(0, 63, 8):
        metric.add_batch(**{name: column[start : start + 8].tolist() for name, column in answers.items()})
    assert metric.compute() == expected


def test_errors(metric: Any) -> None:
    with pytest.raises(ValueError, match="later tasks are unseen"):
        metric.compute(predictions=[1], references=[1], task_ids=[1], after_task=[0])
    with pytest.raises(
        ValueError, match=r"no evaluate module 'accuracy': choose one of \['calibration_error', 'continual_accuracy'\]"
    ):
        path_of("accuracy")


def test_one_module_on_a_line() -> None:
    """What `evaluate`'s scanner of imports reads as one name."""
    for file in FOLDER.glob("*/*.py"):
        for line in file.read_text().splitlines():
            found = re.match(r"\s*(import|from)\s+(.*)", line)
            assert not found or (found[1] == "from" and " import " in found[2]) or "," not in found[2], line


def test_docstring_example(metric: Any) -> None:
    metric.add_batch(predictions=[0, 1], references=[0, 1], task_ids=[0, 0], after_task=[0, 0])
    metric.add_batch(predictions=[0, 2], references=[0, 1], task_ids=[0, 0], after_task=[1, 1])
    metric.add_batch(predictions=[2, 3], references=[2, 3], task_ids=[1, 1], after_task=[1, 1])
    assert metric.compute()["forgetting"] == 50
