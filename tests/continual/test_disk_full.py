"""A disk that is full during a run: one line that names the file and what to do, nothing left over, and the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.saving import adapter
from support.small_disk import small_disk
from support.small_runs import small_trainer, tensors

from cl_prompts.baselines import get_baseline
from cl_prompts.continual import AccuracyMatrix, ContinualTrainer
from cl_prompts.continual.feature_cache.cache import QueryCache
from cl_prompts.continual.run_lock import run_lock
from cl_prompts.evaluation.plots import draw_matrix
from cl_prompts.runtime.files import write_atomically
from cl_prompts.sharing.run_record import RunRecord


def matrix() -> AccuracyMatrix:
    made = AccuracyMatrix()
    for column in ([90.0], [80.0, 70.0]):
        made.add(column, [10] * len(column))
    return made


def left_over(folder: Path) -> list[str]:
    """Files that no run leaves when it ends."""
    return [path.name for path in folder.rglob("*") if path.name.startswith(".")]


# The part of the run that meets the full disk -> its name in the error, settings of the run, largest size of a file.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "checkpoint": (r"checkpoints/0\d+", {"logging_steps": 100}, 2000),
    "log": (r"log\.jsonl", {"logging_steps": 1, "save_steps": 0}, 800),
}


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("case", CASES)
def test_a_run_names_the_file_and_goes_on(case: str, tmp_path: Path) -> None:
    name, settings, size = CASES[case]
    whole = small_trainer("l2p", **settings)
    whole.train()

    def start(resume: bool) -> ContinualTrainer:
        trainer = small_trainer("l2p", tmp_path, **settings)
        trainer.train(resume=resume)
        return trainer

    for resume in (False, True):
        message = f"no room to save .*{name} .*: free some and resume the run"
        with small_disk(size), pytest.raises(OSError, match=message) as full:
            start(resume)
        assert "\n" not in str(full.value)
        assert left_over(tmp_path) == []
        log = tmp_path / "log.jsonl"
        assert all(json.loads(line) for line in log.read_text().splitlines() or []) if log.exists() else case != "log"
    ended = start(True)
    for parameter, tensor in tensors(whole).items():
        assert torch.equal(tensors(ended)[parameter], tensor), parameter
    assert ended.matrix == whole.matrix


FULL: dict[str, Callable[[Path], object]] = {
    "results.json": lambda folder: RunRecord({"l2p": matrix()}).save(folder, None),
    "matrix.csv": lambda folder: matrix().to_csv(folder / "matrix.csv"),
    "matrix.png": lambda folder: draw_matrix(matrix(), folder / "matrix.png"),
    "run.json": lambda folder: write_atomically(folder / "run.json", "x" * 100),
    "adapter": lambda folder: adapter(0).save_pretrained(folder / "adapter"),
    "baseline": lambda folder: get_baseline("finetune", build("vit")).save_pretrained(folder / "baseline"),
}


@pytest.mark.parametrize("name", FULL)
def test_every_file_of_a_run_is_named(name: str, tmp_path: Path) -> None:
    with small_disk(8), pytest.raises(OSError, match=f"no room to save .*{name} .*: free some and save again") as full:
        FULL[name](tmp_path)
    assert "\n" not in str(full.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_query_cache_reports_and_goes_without(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(100):
        assert not QueryCache(tmp_path / "queries", 10**6, said.append).write("0" * 64, torch.ones(50, 4))
    assert said[0].startswith("query cache: nothing could be kept in")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_lock_on_a_disk_that_holds_no_file(tmp_path: Path) -> None:
    with (
        small_disk(0),
        pytest.raises(OSError, match=r"no room to save .*lock .*"),
        run_lock(tmp_path, small_trainer("l2p").accelerator),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
