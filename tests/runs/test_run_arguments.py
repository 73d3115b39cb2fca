"""Settings of a run: how they are read, and where images come from."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
import train_cil
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from support.example_runs import TINY, few_digits, finished, matrices, tensors
from transformers import AutoImageProcessor

from cl_prompts import PromptPoolConfig
from cl_prompts.continual import ContinualArguments
from cl_prompts.runs import BENCHMARKS, MICRO_VIT, RECIPES
from cl_prompts.runs.arguments import Arguments, known_recipes, pairs, read_arguments
from cl_prompts.runs.building import load_backbone
from cl_prompts.runs.digit_rows import numbers
from cl_prompts.runs.images import EMBEDDED, digits, load_image_data, split_by_class


REFERENCES = ("sequential linear probe", "nearest class mean", "discriminant analysis", "joint linear probe")


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


def test_numbers_show_a_digit_between_two_of_its_split() -> None:
    few = {name: rows.select(range(9)) for name, rows in digits().items()}
    splits = numbers(DatasetDict(few))
    for name, rows in splits.items():
        assert rows["label"] == few[name]["label"][:] * 2
        images = [np.asarray(image) for image in rows["image"]]
        assert not any(np.array_equal(one, two) for one, two in zip(images[:9], images[9:], strict=True))
        for image, row in zip(images, [*few[name]["image"], *few[name]["image"]], strict=True):
            middle = np.asarray(row.resize((16, 16), PILImage.Resampling.BILINEAR))
            moves = [(down, right) for down in (7, 8, 9) for right in (7, 8, 9)]
            assert any((image[d : d + 16, r : r + 16] >= middle).all() for d, r in moves), "nothing covers the digit"
            assert image[:, :8].any() or image[:, 24:].any(), "neighbours"
    again = numbers(DatasetDict(few))["train"]["image"]
    assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(splits["train"]["image"], again, strict=True))
    flat = {
        name: Dataset.from_dict({"image": [PILImage.new("L", (8, 8), grey)] * 3, "label": [0, 1, 2]}, few[name].features)
        for name, grey in (("train", 100), ("test", 200))
    }
    for name, rows in numbers(DatasetDict(flat)).items():
        assert {int(np.asarray(image)[16].max()) for image in rows["image"]} == {100 if name == "train" else 200}


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
    processor = AutoImageProcessor.from_pretrained(MICRO_VIT)
    data = load_image_data("digits", None, None, 0, 0)
    image = data.train[0]["image"]
    usual, unit = (data.transform(processor, r, "processor")(image) for r in ("processor", "unit"))
    assert usual.shape == (3, 32, 32)
    assert torch.allclose(usual, unit * 2 - 1, atol=1e-6)
    assert unit.min() >= 0
    assert not torch.equal(usual, data.transform(processor, "processor", "bicubic")(image))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "method": "l2p",
                "num_train_epochs": 7,
                "learning_rate": 1e-4,
                "tasks": 3,
                "config": {"pool_size": 3, "top_k": 2},
            }
        )
    )
    return str(path)


def test_the_command_line_has_the_last_word(recipe: str) -> None:
    args, training = read_arguments(["--recipe", recipe, "--num_train_epochs", "2"])
    assert (args.method, training.num_train_epochs, training.learning_rate, args.tasks) == ("l2p", 2, 1e-4, [3])
    assert pairs(args.config) == {"pool_size": 3, "top_k": 2}
    assert read_arguments(["--recipe", recipe, "--tasks", "2", "4"])[0].tasks == [2, 4]
    # single settings of the method change, the recipe's others stay; but they are not those of another method
    assert pairs(read_arguments(["--recipe", recipe, "--config", "top_k=1"])[0].config) == {"pool_size": 3, "top_k": 1}
    assert read_arguments(["--recipe", recipe, "--method", "hash"])[0].config == []
    assert pairs(["lr=1e-3", "layers=[0, 2]", "head=cosine"]) == {"lr": 1e-3, "layers": [0, 2], "head": "cosine"}


def test_every_setting_of_the_trainer_is_a_flag() -> None:
    line = [
        "--recipe",
        "digits",
        "--learning_rates",
        "head=1e-3",
        "--optim",
        "sgd",
        "--optim_args",
        "momentum=0.9",
        "--warmup_steps",
        "7",
    ]
    _, told = read_arguments([*line, "--memory_size", "50", "--no_cache_queries", "--output_dir", "here"])
    assert (told.learning_rates, told.optim, told.optim_args) == ({"head": 1e-3}, "sgd", {"momentum": 0.9})
    assert (told.warmup_steps, told.memory_size, told.cache_queries, told.output_dir) == (7, 50, False, "here")
    assert not {f.name for f in fields(ContinualArguments)} & {f.name for f in fields(Arguments)}, "no field stands twice"


def test_the_help_has_a_text_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("learning rates of single parameter groups", "steps between two log entries", "Hub id or folder of a"):
        assert words in said
    assert "GRADIENT_ACCUMULATION_STEPS number of micro-batches" in said


@pytest.mark.parametrize("text", ["base=1e-4,head=0.1", '{"base": 1e-4, "head": 0.1}'])
def test_options_of_a_recipe_and_the_command_line_are_merged(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({"method": "er", "memory_size": 4, "learning_rates": text, "optim_args": {"eps": "1e-3"}})
    )
    _, training = read_arguments(["--recipe", str(path), "--learning_rates", "head=1"])
    assert (training.learning_rates, training.optim_args) == ({"base": 1e-4, "head": 1}, {"eps": 1e-3})
    _, other = read_arguments(["--recipe", str(path), "--method", "l2p", "--optim", "sgd"])
    assert (other.learning_rates, other.optim_args) == ({}, {}), "they are of another method and optimizer"


def test_each_seed_has_its_folder() -> None:
    folders = {read_arguments(["--seed", str(seed)])[1].output_dir for seed in (0, 1)}
    assert folders == {"results/numbers-layer_grouped-seed0", "results/numbers-layer_grouped-seed1"}


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_fits_its_method(name: str) -> None:
    args, training = read_arguments(["--recipe", name])
    assert PromptPoolConfig(method=args.method, **pairs(args.config)).method == args.method
    assert (args.joint, args.resume) == (False, False)
    assert args.held_out == (0.2 if name.endswith("imagenet_r") else 0.0), "only that data set has no test split"
    assert args.input_range in ("unit", "processor")
    if args.scenario == "gaussian":
        assert training.num_train_epochs == 1
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith("#"), "a recipe says where its numbers are from"
    if not name.endswith("_mini") and name not in (*EMBEDDED, "photos"):
        if not name.startswith("default_"):  # of no paper
            assert args.input_range == "unit", "the papers' inputs are in [0, 1]"
        assert "model:" in text, "the weights that the paper used are part of the recipe"


OF_DATA = ("dataset", "label_column", "domain_column", "scenario", "order", "common_test", "held_out", "tasks")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_one_word(name: str) -> None:
    """A method with a recipe for it takes that one; others take its data with the settings for photographs."""
    args, training = read_arguments(["--benchmark", name, "--method", "ewc"])
    data = {setting: getattr(args, setting) for setting in OF_DATA}
    assert all("/" in source for source in args.dataset), "Hub ids"
    assert (args.model, args.method) == ("google/vit-base-patch16-224-in21k", "ewc")
    assert (args.config, training.output_dir) == ([], f"results/{name}-ewc-seed0")
    assert read_arguments(["--benchmark", name, "--method", "ewc", "--tasks", "3"])[0].tasks == [3]
    of_benchmark = [recipe for recipe in known_recipes() if recipe.endswith(f"_{name}") and "gaussian" not in recipe]
    for recipe in set(of_benchmark) - {f"default_{name}"}:  # no method is called "default"
        args, training = read_arguments(["--benchmark", name, "--method", recipe.removesuffix(f"_{name}")])
        own, own_training = read_arguments(["--recipe", recipe, "--output_dir", str(training.output_dir)])
        assert {setting: getattr(args, setting) for setting in OF_DATA} == data
        assert (replace(args, benchmark=None), training) == (replace(own, recipe=None), own_training)


def test_a_recipe_on_another_benchmark() -> None:
    args, training = read_arguments(["--recipe", "l2p_cifar100", "--benchmark", "cub"])
    assert (args.dataset, args.label_column) == (["bentrevett/caltech-ucsd-birds-200-2011"], "label")
    assert (args.method, training.batch_size) == ("l2p", 16)
    assert training.output_dir == "results/l2p_cifar100-cub-l2p-seed0"


def test_help_lists_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_arguments(["--help"])
    said = "".join(capsys.readouterr().out.split())
    kinds = [get_type_hints(kind) for kind in (Arguments, ContinualArguments)]
    choices = [get_args(hint) for hints in kinds for hint in hints.values() if get_origin(hint) is Literal]
    assert len(choices) == 8
    for words in choices:
        assert "{" + ",".join(words) + "}" in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--recipe", "nope"], r"no recipe 'nope'.*digits"),
        (["--views", "3"], r"--views 3 has no effect without --augment True: add that, or leave it out"),
        (["--epoch_count", "3"], r"no such arguments: \['--epoch_count', '3'\]"),
        (["--method", "nope"], r"--method nope: there is .*ewc, .*hash"),
        (["--scenario", "nope"], r"--scenario: invalid choice: 'nope' \(choose from '?class'?, '?domain'?"),
        (["--seed", "nope"], r"argument --seed: invalid int value: 'nope'$"),
        (["--benchmark", "nope"], r"no benchmark 'nope': choose one of \['5datasets', 'cifar100'"),
        (["--extra_classifiers", "ridge", "nope"], r"--extra_classifiers nope: there is aligned"),
        (["--trackers", "nope"], r"--trackers nope: there is .*\(installed\)"),
        (["--method", "icarl"], "icarl needs remembered images: set --memory_size"),
        (["--num_train_epochs", "0"], "num_train_epochs=0 must be a positive integer"),
        (["--learning_rates", "0.1"], r"learning_rates='0.1': write like key=value,key=value or as a JSON object"),
        (["--optim_args", "{nope"], r"optim_args='{nope' is no JSON object"),
        (["--config", "0.1"], r"expected name=value, got \['0.1'\]"),
    ],
)
def test_unknown_settings_are_named(line: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        read_arguments(line)


def test_a_recipe_may_set_arguments_only(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("epoch: 3")
    with pytest.raises(SystemExit, match=r"sets \['epoch'\]"):
        read_arguments(["--recipe", str(tmp_path / "bad.yaml")])


def test_a_recipe_may_set_choices_only(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("resample: nope")
    with pytest.raises(SystemExit, match="--resample nope: there is processor, bilinear, bicubic"):
        read_arguments(["--recipe", str(tmp_path / "bad.yaml")])


def references_of(output: Path) -> dict[str, Any]:
    found = matrices(output)
    return {name: found[name] for name in REFERENCES}


@pytest.mark.slow
def test_references_of_a_trained_backbone_are_those_of_the_frozen_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also in a run that goes on: its checkpoint has a backbone that has learnt."""
    (tmp_path / "data").mkdir()
    data = few_digits(tmp_path / "data")

    def run(method: str, *line: str) -> Path:
        output = tmp_path / method
        words = [
            "--dataset",
            str(data),
            *TINY,
            "--method",
            method,
            "--learning_rate",
            "1e-3",
            "--output_dir",
            str(output),
            *line,
        ]
        monkeypatch.setattr(sys, "argv", ["train_cil.py", *words])
        train_cil.main()
        return output

    frozen, trained = references_of(run("frozen")), run("finetune")
    assert references_of(trained) == frozen
    learnt = tensors(trained, "learner.safetensors")
    (trained / "results.json").unlink()  # as if it had been killed at its end
    run("finetune", "--resume")
    assert references_of(trained) == frozen
    again = tensors(trained, "learner.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in learnt.items())
    given = load_backbone(str(MICRO_VIT), "sdpa").state_dict()
    assert any(not torch.equal(again[f"parameters.features.base.{name}"], tensor) for name, tensor in given.items())


@pytest.mark.slow
def test_two_processes_have_the_references_of_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    data = few_digits(tmp_path / "data")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    line = ["--method", "finetune", "--learning_rate", "1e-3"]
    finished(data, tmp_path / "one", "--method", "frozen", "--learning_rate", "1e-3")
    finished(data, tmp_path / "two", *line, launcher=torchrun)
    one, two = references_of(tmp_path / "one"), references_of(tmp_path / "two")
    for name, matrix in one.items():
        for ours, theirs in zip(matrix["columns"], two[name]["columns"], strict=True):
            assert theirs == pytest.approx(ours, abs=100 / 8 + 1e-9), name  # one image
