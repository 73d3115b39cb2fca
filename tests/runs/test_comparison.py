"""Several learners and seeds in one table: runs that fail lose no others, complete ones are not run again."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import yaml
from support.example_runs import few_digits

from cl_prompts.continual import AccuracyMatrix
from cl_prompts.continual.arguments import key_values
from cl_prompts.runs import comparison
from cl_prompts.runs.arguments import pairs, read_arguments
from cl_prompts.runs.run_folder import described
from cl_prompts.runs.train import main as train
from cl_prompts.sharing.run_record import RunRecord


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_digits(tmp_path_factory.mktemp("digits"))


def rows_file(folder: Path, rows: Mapping[Any, Any], **settings: Any) -> str:
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "rows": dict(rows)}, sort_keys=False))
    return str(path)


def called(monkeypatch: pytest.MonkeyPatch, *line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["comparison.py", *line])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    comparison.main(line)


def test_a_line_from_settings() -> None:
    line = comparison.as_line(
        {
            "learning_rate": 0.1,
            "augment": True,
            "config": {"layers": [0, 2], "top_k": 2},
            "extra_classifiers": ["ridge", "aligned"],
        }
    )
    expected = "--learning_rate 0.1 --augment True --config layers=[0, 2] top_k=2 --extra_classifiers ridge aligned"
    assert " ".join(line) == expected
    assert comparison.as_line({"extra_classifiers": [], "config": {}, "memory_batch_size": None}) == []
    rates = {"base": 1e-5, "head": 0.1}
    assert key_values("learning_rates", comparison.as_line({"learning_rates": rates})[1]) == rates
    config = {"num_labels": None, "layers": [0, None], "kind": "a", "names": ["a"], "on": True, "lr": 1e-5}
    line = comparison.as_line({"config": config})
    assert pairs(line[1:]) == config
    assert "on=True" in line, "written as before: run.json of complete runs has it"


def test_a_recipe_sets_its_methods_settings_to_none(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{method: l2p, config: {num_labels: null, layers: [0, null], top_k: 2, flag: true}}")
    read, _ = read_arguments(["--recipe", str(recipe)])
    assert pairs(read.config) == {"num_labels": None, "layers": [0, None], "top_k": 2, "flag": True}


def test_what_is_empty_is_left_out_or_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{method: l2p, extra_classifiers: [ridge], config: {top_k: 2}}")
    settings: dict[str, Any] = {"method": "l2p", "extra_classifiers": [], "config": {}, "memory_batch_size": None}
    (run,) = comparison.plan({"L2P": settings}, [0], tmp_path, [])
    assert (run.arguments.extra_classifiers, run.arguments.config, run.training.memory_batch_size) == ([], [], None)
    (run,) = comparison.plan({"L2P": {"recipe": str(recipe), "config": {}}}, [0], tmp_path, [])
    assert run.arguments.config == ["top_k=2"]
    (run,) = comparison.plan({"L2P": {"num_train_epochs": None}}, [0], tmp_path, ["--num_train_epochs", "3"])
    assert run.training.num_train_epochs == 3
    for row, message in (
        (
            {"recipe": str(recipe), "extra_classifiers": []},
            r"row 'L2P': extra_classifiers has no value in \[\]: give it one, or leave it out",
        ),
        ({"num_train_epochs": None}, "row 'L2P': num_train_epochs has no value in None"),
        ({"epochz": None}, "row 'L2P': epochz has no value in None"),
        ({"dataset": ["digits", None]}, r"row 'L2P': dataset has no value in \['digits', None\]"),
        ({"num_train_epochs": "many"}, r"row 'L2P': argument --num_train_epochs/\S+: invalid int value: 'many'$"),
        ({"extra_classifiers": "rigde"}, "row 'L2P': --extra_classifiers rigde: there is"),
    ):
        with pytest.raises(SystemExit, match=message):
            comparison.plan({"L2P": row}, [0], tmp_path, [])


def test_bad_rows_are_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")]
    good = rows_file(tmp_path, {"L2P": {"method": "l2p"}})
    for line, message in (
        (["nope"], r"no comparison 'nope': choose one of \['compare_"),
        ([good, "--rows", "L3P"], r"--rows \['L3P'\] are none of \['L2P'\]"),
        ([good, "--jobs", "0"], "--jobs 0 must be positive"),
        ([good, "--epochz", "3"], r"no such arguments: \['--epochz', '3'\]"),
    ):
        with pytest.raises(SystemExit, match=message):
            called(monkeypatch, *line, *output)
    for rows, message in (
        ({"L2P": {"method": "l3p"}}, "--method l3p: there is"),
        ({"L2P": {"method": "l2p"}, "l2p!": {"method": "l2p"}}, r"rows \['L2P', 'l2p!'\].*would share a results folder"),
        (
            {"L2P": {"extra_classifiers": ["ridge"]}, "L2P + ridge": {}},
            r"rows \['L2P \+ ridge'\] are named like another row",
        ),
        ({"L2P": ["l2p"]}, r"'L2P' must have a mapping of arguments, not \['l2p'\]"),
        ({False: {"method": "l2p"}}, "False is not a text, as names of rows must be: put it in quotes"),
        ({}, "has no rows"),
    ):
        with pytest.raises(SystemExit, match=message):
            called(monkeypatch, rows_file(tmp_path, rows), *output)
    (tmp_path / "list.yaml").write_text("- L2P")
    with pytest.raises(SystemExit, match="must have `rows`"):
        called(monkeypatch, str(tmp_path / "list.yaml"), *output)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_complete_runs_are_read_and_a_failing_row_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    path = rows_file(tmp_path, {"L2P": {"method": "l2p", "extra_classifiers": ["discriminant"]}, "gone": {"method": "vpt"}})
    common = ["--dataset", str(data), "--tasks", "2", "--num_train_epochs", "1", "--output", str(tmp_path / "out")]
    words = comparison.plan({"L2P": comparison.read_rows(path)["L2P"]}, [0, 1], tmp_path / "out", common[:-2])
    for run in words:
        train(run.words)
    with pytest.raises(SystemExit, match="some runs failed"):
        # `false` ends at once with exit code 1
        called(monkeypatch, path, "--seeds", "0", "1", "--launcher", "false", *common)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert first_cells(page)[:2] == ["L2P", "L2P + discriminant"]
    assert page.count("gone, seed ") == 2
    assert "no output (exit code 1, " in page
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())["results"]
    assert set(numbers["L2P"]) == {"0", "1"}
    values = [numbers["L2P"][seed]["faa"] for seed in ("0", "1")]
    assert f"| L2P | 2 | {mean(values):.1f} ± {stdev(values):.1f} |" in page
    # The picture shows whom one asks for.
    drawn = (tmp_path / "out" / "curves.png").read_bytes()
    called(monkeypatch, path, "--rows", "L2P", "--draw", "L2P + discriminant", *common)
    assert (tmp_path / "out" / "curves.png").read_bytes() != drawn
    with pytest.raises(SystemExit, match=r"--draw \['nobody'\] are none of \['L2P', 'L2P \+ discriminant', 'sequential"):
        called(monkeypatch, path, "--rows", "L2P", "--draw", "L2P", "nobody", *common)


def complete(run: comparison.Run, *columns: list[float], references: tuple[str, ...] = ("nearest class mean",)) -> None:
    """A run's folder as the run would leave it, its references ten points below it."""
    matrices = {run.arguments.method: AccuracyMatrix(), **{name: AccuracyMatrix() for name in references}}
    for number, matrix in enumerate(matrices.values()):
        for column in columns:
            matrix.add([accuracy - 10 * min(number, 1) for accuracy in column], [10] * len(column))
    run.folder.mkdir(parents=True)
    (run.folder / "run.json").write_text(json.dumps(described(run.arguments, run.training)))
    RunRecord(matrices, trainable={run.arguments.method: 5}, seconds=7.0).save(run.folder, None)


@pytest.mark.slow
def test_rows_with_another_number_of_tasks_have_a_table_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows: dict[str, Any] = {"joint": {"method": "l2p", "joint": True}, "L2P": {"method": "l2p"}, "VPT": {"method": "vpt"}}
    out = tmp_path / "out"
    for run in comparison.plan(rows, [0, 1], out, []):
        complete(run, *([[60.0 + run.training.seed]] if run.row == "joint" else [[90.0], [80.0, 70.0]]))
    line = [rows_file(tmp_path, rows), "--seeds", "0", "1", "--launcher", "false", "--output", str(out)]
    called(monkeypatch, *line)
    page = (out / "comparison.md").read_text()
    table, _, below = page.partition("With 1 task, so not in the table above:")
    assert first_cells(table) == ["L2P", "VPT", "nearest class mean"]
    assert "| nearest class mean | 2 | 65.0 ± 0.0 |" in table
    assert first_cells(below) == ["joint"]
    assert "| joint | 2 | 60.5 ± 0.7 |" in below
    assert "Failed" not in page
    assert "42 seconds for all runs" in page
    numbers = json.loads((out / "comparison.json").read_text())["results"]
    assert list(numbers) == ["L2P", "VPT", "nearest class mean", "joint"]
    assert all(list(found) == ["0", "1"] for found in numbers.values())
    assert numbers["joint"]["1"]["faa"] == 61.0
    with pytest.raises(SystemExit, match=r"--draw \['joint'\] are none of \['L2P', 'VPT', 'nearest class mean'\]"):
        called(monkeypatch, *line, "--draw", "joint")


def test_a_damaged_results_file_is_told_with_its_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"L2P": {"method": "l2p"}, "VPT": {"method": "vpt"}}
    runs = comparison.plan(rows, [0, 1], tmp_path / "out", [])
    for run in runs:
        complete(run, [90.0], [80.0, 70.0])
    line = [rows_file(tmp_path, rows), "--seeds", "0", "1", "--launcher", "false", "--output", str(tmp_path / "out")]
    file = runs[0].folder / "results.json"
    text = file.read_text()
    whole = json.loads(text)
    for damaged in (
        "[]",
        json.dumps({**whole, "results": {}}),
        json.dumps({**whole, "results": {"l2p": {"columns": [], "sizes": []}}}),
        json.dumps({**whole, "seconds": None}),
        json.dumps({**whole, "trainable": None}),
        text[:40],
    ):
        file.write_text(damaged)
        runs[0].error = ""
        assert comparison.read_run(runs[0]) == {}
        assert runs[0].error.startswith(f"{file} is damaged ("), damaged
    with pytest.raises(SystemExit, match="some runs failed, see above"):
        called(monkeypatch, *line)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert f"- L2P, seed 0: {runs[0].error}" in page
    assert "): remove it, the run then continues from its last checkpoint when it is resumed\n" in page
    assert "Not complete" not in page
    assert "| L2P | 1 | 75.0 |" in page
    assert "| nearest class mean | 2 | 65.0 ± 0.0 |" in page, "the references of the row that has both seeds"


def first_cells(page: str) -> list[str]:
    """Names of the table's rows."""
    return [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:]


@pytest.mark.slow
def test_two_methods_two_seeds_and_one_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    rows = {"L2P": {"method": "l2p"}, "no prompts": {"method": "none"}, "wrong": {"method": "l2p", "config": {"top_k": 99}}}
    path = rows_file(tmp_path, rows, dataset=str(data), num_train_epochs=1)
    common = ["--tasks", "2", "--batch_size", "16", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="some runs failed"):
        called(monkeypatch, path, "--seeds", "0", "1", "--jobs", "2", *common)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert first_cells(page)[:3] == ["L2P", "no prompts", "sequential linear probe"]
    assert len(set(first_cells(page))) == len(first_cells(page)), "references are those of one row"
    assert "- wrong, seed 1: top_k=99" in page
    killed = tmp_path / "out" / "l2p-seed1" / "results.json"
    killed.unlink()  # as if it had been killed at its end
    called(monkeypatch, path, "--seeds", "0", "1", "--rows", "L2P", "no prompts", *common)
    assert killed.exists()
    again = (tmp_path / "out" / "comparison.md").read_text()
    assert "wrong" not in again
    assert first_cells(again) == first_cells(page)
