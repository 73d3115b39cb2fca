"""The example: where images come from, how settings are read, and a small run by one and by two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image, Value
from families import build
from methods import METHODS
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from cl_prompts import get_prompt_pool_model
from cl_prompts.continual import ClassIncrementalStream


EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from images import digits, load_image_data, split_by_class  # noqa: E402
from train_cil import pairs, read_arguments, train_task  # noqa: E402


def pictures(count: int) -> list[PILImage.Image]:
    random = np.random.default_rng(0)
    return [PILImage.fromarray(random.integers(0, 255, (6, 6), dtype=np.uint8)) for _ in range(count)]


def parquet_folder(folder: Path, *, second_label: bool = False) -> Path:
    features = Features({"img": Image(), "fine": ClassLabel(names=["owl", "jay"])})
    columns: dict[str, Any] = {"img": pictures(6), "fine": [0, 1] * 3}
    if second_label:
        features["coarse"] = Value("int64")
        columns["coarse"] = [0] * 6
    for split in ("train", "test"):
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_digits_are_real_and_split_by_class() -> None:
    splits = digits()
    assert (len(splits["train"]), len(splits["test"])) == (1438, 359)
    assert np.bincount(splits["test"]["label"]).min() >= 34
    image = np.asarray(splits["train"][0]["image"])
    assert image.shape == (8, 8)
    assert image.max() > 200


def test_a_folder_of_parquet_files(tmp_path: Path) -> None:
    data = load_image_data(str(parquet_folder(tmp_path)), None, None, 0, 0)
    assert (data.image_column, data.label_column) == ("img", "fine")
    assert (len(data.train), len(data.test)) == (6, 6)
    assert data.names([1]) == {1: "jay"}


def test_an_ambiguous_column_is_asked_for(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path, second_label=True))
    with pytest.raises(ValueError, match=r"cannot tell the label column .*--label_column"):
        load_image_data(folder, None, None, 0, 0)
    assert load_image_data(folder, None, "fine", 0, 0).label_column == "fine"


def test_a_folder_of_image_folders(tmp_path: Path) -> None:
    for number, picture in enumerate(pictures(12)):
        folder = tmp_path / ("train" if number < 8 else "test") / ("owl" if number % 2 else "jay")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png")
    data = load_image_data(str(tmp_path), None, None, 0, 0)
    assert (len(data.train), len(data.test)) == (8, 4)
    assert data.classes == [0, 1]
    assert data.names([0, 1]) == {0: "jay", 1: "owl"}


def test_held_out_images_come_from_the_training_set() -> None:
    data = load_image_data("digits", None, None, 0.2, 0)
    assert len(data.train) + len(data.test) == 1438
    labels = np.bincount(data.train["label"]) / np.bincount(data.test["label"])
    assert (abs(labels - 4) < 0.3).all()
    rows = Dataset.from_dict({"label": [0] * 10 + [1] * 10, "row": list(range(20))})
    train, test = split_by_class(rows, "label", 0.2, seed=1)
    assert sorted([*train["row"], *test["row"]]) == list(range(20))
    assert list(split_by_class(rows, "label", 0.2, seed=1)[1]["row"]) == list(test["row"])


def test_a_missing_test_split_is_named(tmp_path: Path) -> None:
    parquet_folder(tmp_path)
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"only the splits \['train'\].*--held_out"):
        load_image_data(str(tmp_path), None, None, 0, 0)


def test_input_range_and_resampling() -> None:
    processor = AutoImageProcessor.from_pretrained(EXAMPLES / "micro_vit")
    data = load_image_data("digits", None, None, 0, 0)
    image = data.train[0]["image"]
    usual, unit = (data.transform(processor, r, "processor")(image) for r in ("processor", "unit"))
    assert usual.shape == (3, 32, 32)
    assert torch.allclose(usual, unit * 2 - 1, atol=1e-6)
    assert unit.min() >= 0
    assert not torch.equal(usual, data.transform(processor, "processor", "bicubic")(image))


def arguments(monkeypatch: pytest.MonkeyPatch, *line: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train_cil.py", *line])
    return read_arguments()


def test_the_command_line_has_the_last_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"method": "l2p", "epochs": 7, "lr": 1e-4, "config": {"pool_size": 3, "top_k": 2}}))
    args = arguments(monkeypatch, "--recipe", str(recipe), "--epochs", "2")
    assert (args.method, args.epochs, args.lr) == ("l2p", 2, 1e-4)
    assert pairs(args.config) == {"pool_size": 3, "top_k": 2}
    # a recipe's method settings are not those of another method
    assert arguments(monkeypatch, "--recipe", str(recipe), "--method", "hash").config == []
    assert pairs(["lr=1e-3", "layers=[0, 2]", "head=cosine"]) == {"lr": 1e-3, "layers": [0, 2], "head": "cosine"}


@pytest.mark.parametrize("recipe", sorted(p.stem for p in (EXAMPLES / "recipes").glob("*.yaml")))
def test_every_recipe_is_readable(monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    from cl_prompts import PromptPoolConfig

    args = arguments(monkeypatch, "--recipe", recipe)
    assert PromptPoolConfig(method=args.method, **pairs(args.config)).method == args.method


def test_unknown_recipes_and_settings_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no recipe 'nope'.*digits"):
        arguments(monkeypatch, "--recipe", "nope")
    (tmp_path / "bad.yaml").write_text("epoch: 3")
    with pytest.raises(SystemExit, match=r"sets \['epoch'\]"):
        arguments(monkeypatch, "--recipe", str(tmp_path / "bad.yaml"))


def run_example(output: Path, *launcher: str) -> dict[str, Any]:
    settings = ["--tasks", "2", "--epochs", "1", "--lr", "0.01", "--config", "layers=[0]", "--output", str(output)]
    command = [*launcher, str(EXAMPLES / "train_cil.py"), *settings]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nearest class mean" in done.stdout
    results: dict[str, Any] = json.loads((output / "results.json").read_text())["results"]
    return results


@pytest.mark.slow
def test_two_processes_run_the_example_as_one(tmp_path: Path) -> None:
    one = run_example(tmp_path / "one", sys.executable)
    two = run_example(tmp_path / "two", sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    for learner, matrix in one.items():
        for ours, theirs in zip(matrix["columns"], two[learner]["columns"], strict=True):
            assert theirs == pytest.approx(ours, abs=0.6), learner  # one image of 180
    tensors = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    counts = [t["base_model.pools.prompt_pool.pool.history.counts"] for t in tensors]
    assert torch.equal(*counts)
    assert {p.name for p in (tmp_path / "one").iterdir()} == {
        "adapter",
        "results.json",
        "results.md",
        "curves.png",
        "matrix.png",
        "selection.png",
    }
    for name in ("one", "two"):
        text = (tmp_path / name / "results.md").read_text()
        assert text.count("routing entropy") == 2
        assert text.startswith("| learner |")


@pytest.mark.parametrize("method", ["hide", "coda one-stage"])
def test_queries_are_cached_for_methods_that_ask_in_tasks_or_in_training_only(
    monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"image": list(range(4)), "label": [0, 1, 0, 1]})
    stream = ClassIncrementalStream(data, data, [[0, 1]], images.__getitem__)
    model = get_prompt_pool_model(build("vit"), METHODS[method]()).eval()
    passes: list[int] = []
    model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    model.begin_task([0, 1])
    args = arguments(monkeypatch, "--epochs", "1", "--batch_size", "4")
    train_task(Accelerator(cpu=True), model, stream, stream.tasks[0], args, torch.randn(4, 32))
    assert len(passes) == 1  # the prompted one
