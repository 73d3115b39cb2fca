"""Recipes and comparisons: each is read and builds its model, and two steps of each on images of the same columns."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from support.recipe_data import generated, tiny_vit

from cl_prompts.runs import RECIPES, comparison
from cl_prompts.runs.arguments import Arguments, known_recipes, read_arguments
from cl_prompts.runs.building import build_learner, build_stream
from cl_prompts.runs.class_order import ordered_classes, tasks_in_order
from cl_prompts.runs.comparison import as_line
from cl_prompts.runs.images import EMBEDDED
from cl_prompts.runs.sweep import read_sweep
from cl_prompts.runs.train import main as train


COMPARISONS = sorted(path.stem for path in RECIPES.glob("compare_*.yaml"))
DRY = [("compare_hash_imagenet_r", "OVOR")]  # names as labels and one split; the others are slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vit(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return generated(tmp_path_factory.mktemp("data"))


def build(arguments: Arguments, base: Path) -> Any:
    stream: Any = SimpleNamespace(
        task_free=arguments.scenario == "gaussian" and arguments.parts == 1 and not arguments.joint, classes=list(range(10))
    )
    return build_learner(replace(arguments, model=str(base)), stream, 0)


BUILT: set[str] = set()  # rows of other comparisons, which need not be built again


@pytest.mark.by_turns(9)
@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", COMPARISONS)
def test_every_comparison_is_read_and_builds(name: str, base: Path, tmp_path: Path) -> None:
    rows = comparison.read_rows(name)
    runs = comparison.plan(rows, [0], tmp_path, [])
    assert [run.row for run in runs] == list(rows)
    assert (RECIPES / f"{name}.yaml").read_text().startswith("#"), "it says where its numbers are from"
    for run in runs:
        built = repr((run.arguments.method, run.arguments.config, run.arguments.scenario))
        if built not in BUILT:
            build(run.arguments, base)
            BUILT.add(built)


@pytest.mark.by_turns(9)
@pytest.mark.xdist_group("recipes")
@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_builds(name: str, base: Path) -> None:
    arguments = read_arguments(["--recipe", name])[0]
    assert build(arguments, base).adapter.config.method == arguments.method


def dry_run(line: list[str], base: Path, data: dict[str, str], output: Path) -> dict[str, Any]:
    arguments, _ = read_arguments(line)
    sources = [data[source] for source in arguments.dataset]
    tiny = ["--model", str(base), "--dataset", *sources, "--max_steps", "2", "--batch_size", "4"]
    train([*line, *tiny, "--save_steps", "0", "--output_dir", str(output)])
    results: dict[str, Any] = json.loads((output / "results.json").read_text())["results"]
    return results


def all_rows() -> list[Any]:
    """Every single recipe, and every row of every comparison on the papers' data."""
    found = [(name, "") for name in known_recipes() if not name.endswith("_mini") and name not in (*EMBEDDED, "photos")]
    for name in COMPARISONS:
        if not name.endswith("_mini") and name != "compare_digits":
            found += [(name, row) for row in comparison.read_rows(name)]
    return [
        pytest.param(
            *case, marks=[] if case in DRY else [pytest.mark.slow], id=f"{case[0]}-{case[1]}" if case[1] else case[0]
        )
        for case in found
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "row"), all_rows())
def test_a_dry_run(
    name: str, row: str, base: Path, data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    settings = as_line(comparison.read_rows(name)[row]) if row else ["--recipe", name]
    results = dry_run(settings, base, data, tmp_path / "out")
    first = next(iter(results.values()))
    assert all(np.isfinite(first["accuracies"][-1])) if "accuracies" in first else first


# ---- class orders --------------------------------------------------------------------------------------------------


def test_class_orders_of_the_releases(tmp_path: Path) -> None:
    """The first classes of PILOT's CIFAR-100 stand in many papers; CODA-Prompt's seed 0 is ascending."""
    hundred = list(range(100))
    assert ordered_classes(hundred, ["natural"], 3) == hundred
    assert ordered_classes(hundred, ["pilot"], 3)[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert ordered_classes(hundred, ["coda"], 0) == hundred
    assert ordered_classes(hundred, ["coda"], 1)[:5] == [53, 37, 65, 51, 4]
    assert ordered_classes(hundred, ["seed"], 3) == np.random.default_rng(3).permutation(100).tolist()
    names = ["b", "a", "c"]
    assert ordered_classes(names, ["c", "a", "b"], 0) == ["c", "a", "b"]
    for suffix, text in ((".txt", "2 0 1"), (".json", "[2, 0, 1]"), (".yaml", "- 2\n- 0\n- 1")):
        (tmp_path / f"order{suffix}").write_text(text)
        assert tasks_in_order([0, 1, 2], [1, 2], [str(tmp_path / f"order{suffix}")], 0) == [[2], [0, 1]]
    for order, message in (
        (["nope"], r"one of natural, seed, pilot, coda, a file, or list every class once: it has unknown \['nope'\]"),
        (["0", "1", "1"], r"twice \['1'\], and lacks \['2'\]"),
        ([str(tmp_path / "gone.txt")], r"gone.txt' is no file: name one"),
    ):
        with pytest.raises(ValueError, match=message):
            ordered_classes([0, 1, 2], order, 0)


def test_columns_are_checked_when_data_are_loaded(data: dict[str, str], base: Path) -> None:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(base)
    for line, message in (
        (["--domain_column", "place"], r"core50: the training set has no column 'place', .*: pass --domain_column"),
        (["--label_column", "object"], r"core50: the training set has no column 'object', .*: pass --label_column"),
        (["--order", "1", "12"], "domain '12' has no training images; the training set has domains"),
    ):
        arguments, _ = read_arguments(["--recipe", "l2p_core50", "--dataset", data["adrake17/core50"], *line])
        with pytest.raises(ValueError, match=message):
            build_stream(arguments, processor, 0)


# ---- sweeps --------------------------------------------------------------------------------------------------------


def test_a_sweep_is_all_combinations() -> None:
    sweep = read_sweep({"config": {"top_k": [1, 5]}, "batch_size": [4, 8]}, {"method": "l2p", "config": {"pool_size": 9}})
    assert list(sweep.rows) == [f"top_k {k}, batch_size {size}" for k in (1, 5) for size in (4, 8)]
    assert sweep.rows["top_k 5, batch_size 4"] == {"method": "l2p", "config": {"pool_size": 9, "top_k": 5}, "batch_size": 4}
    assert sweep.points["top_k 5, batch_size 4"] == (5, 4)
    for content, message in (
        ([1], r"sweep=\[1\] must map settings to lists"),
        ({"batch_size": 4}, "batch_size has 4: give a list of values"),
        ({"config": {"top_k": []}}, r"top_k has \[\]: give a list"),
        ({"config": [1]}, r"config has \[1\]: map the method's settings to lists"),
    ):
        with pytest.raises(ValueError, match=message):
            read_sweep(content, {})


@pytest.mark.slow
def test_a_sweep_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path, data: dict[str, str]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    path = tmp_path / "sweep.yaml"
    settings = {"method": "l2p", "model": str(base), "dataset": data["data/vtab"], "tasks": 2, "max_steps": 1}
    path.write_text(yaml.safe_dump({"settings": settings, "sweep": {"config": {"prompt_length": [2]}}}))
    output = tmp_path / "out"
    rows, sweep = comparison.read_comparison(str(path))
    runs = comparison.plan(rows, [0], output, [])
    for run in runs:
        train(run.words)
    comparison.write(runs, output, "cl-prompts compare", None, sweep)
    assert "![final average accuracy over the sweep](sweep.png)" in (output / "comparison.md").read_text()
    assert (output / "sweep.png").stat().st_size > 5000
