"""Several learners and seeds in one table: runs that fail lose no others, complete ones are not run again."""

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import compare
import pytest
import train_cil
import yaml
from arguments import pairs
from example_runs import EXAMPLES, few_digits

from cl_prompts import PromptPoolConfig
from cl_prompts.configs import METHODS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_digits(tmp_path_factory.mktemp("digits"))


def rows_file(folder: Path, rows: dict[str, Any], **settings: Any) -> str:
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "rows": rows}))
    return str(path)


def called(monkeypatch: pytest.MonkeyPatch, *line: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", *line])
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    compare.main()


@pytest.mark.parametrize("name", sorted(p.stem for p in (EXAMPLES / "recipes").glob("compare_*.yaml")))
def test_every_comparison_is_readable(name: str, tmp_path: Path) -> None:
    rows = compare.read_rows(name)
    runs = compare.plan(rows, [0, 1], tmp_path, [])
    assert [run.row for run in runs] == [*rows, *rows]
    for run in runs:
        assert run.arguments.folder.parent == tmp_path
        if run.arguments.method in METHODS:
            task_free = {"num_labels": 9} if run.arguments.scenario == "gaussian" else {}
            PromptPoolConfig(method=run.arguments.method, **task_free, **pairs(run.arguments.config))


def test_a_line_from_settings() -> None:
    line = compare.as_line(
        {"lr": 0.1, "augment": True, "config": {"layers": [0, 2], "top_k": 2}, "also": ["ridge", "aligned"]}
    )
    expected = "--lr 0.1 --augment True --config layers=[0, 2] top_k=2 --also ridge aligned"
    assert " ".join(line) == expected


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
    ):
        with pytest.raises(SystemExit, match=message):
            called(monkeypatch, rows_file(tmp_path, rows), *output)
    (tmp_path / "list.yaml").write_text("- L2P")
    with pytest.raises(SystemExit, match="must have `rows`"):
        called(monkeypatch, str(tmp_path / "list.yaml"), *output)
    assert not (tmp_path / "out").exists()


def test_complete_runs_are_read_and_a_failing_row_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path
) -> None:
    path = rows_file(tmp_path, {"L2P": {"method": "l2p", "also": ["discriminant"]}, "gone": {"method": "vpt"}})
    common = ["--dataset", str(data), "--tasks", "2", "--epochs", "1", "--output", str(tmp_path / "out")]
    words = compare.plan({"L2P": compare.read_rows(path)["L2P"]}, [0, 1], tmp_path / "out", common[:-2])
    for run in words:
        monkeypatch.setattr(sys, "argv", ["train_cil.py", *run.words])
        train_cil.main()
    with pytest.raises(SystemExit, match="some runs failed"):
        # `false` ends at once with exit code 1
        called(monkeypatch, path, "--seeds", "0", "1", "--launcher", "false", *common)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert first_cells(page)[:2] == ["L2P", "L2P + discriminant"]
    assert page.count("gone, seed ") == 2
    assert "it said nothing (exit code 1, " in page
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


def first_cells(page: str) -> list[str]:
    """Names of the table's rows."""
    return [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")][1:]


@pytest.mark.slow
def test_two_methods_two_seeds_and_one_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: Path) -> None:
    rows = {"L2P": {"method": "l2p"}, "no prompts": {"method": "none"}, "wrong": {"method": "l2p", "config": {"top_k": 99}}}
    path = rows_file(tmp_path, rows, dataset=str(data), epochs=1)
    common = ["--tasks", "2", "--batch_size", "16", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="some runs failed"):
        called(monkeypatch, path, "--seeds", "0", "1", "--jobs", "2", *common)
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert first_cells(page)[:3] == ["L2P", "no prompts", "sequential linear probe"]
    assert len(set(first_cells(page))) == len(first_cells(page)), "references are those of one row"
    assert "- wrong, seed 1: ValueError: top_k=99" in page
    killed = tmp_path / "out" / "l2p-seed1" / "results.json"
    killed.unlink()  # as if it had been killed at its end
    called(monkeypatch, path, "--seeds", "0", "1", "--rows", "L2P", "no prompts", *common)
    assert killed.exists()
    again = (tmp_path / "out" / "comparison.md").read_text()
    assert "wrong" not in again
    assert first_cells(again) == first_cells(page)
