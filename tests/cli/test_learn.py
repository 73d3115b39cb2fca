"""`cl-prompts learn` and `evaluate`: the next task from a folder of images, in one command."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.families import build
from support.methods import METHODS, WITH_CLASSIFIER
from transformers import ViTImageProcessor, ViTModel
from transformers.utils import logging

from cl_prompts import AutoPromptPoolModel, PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.cli import main
from cl_prompts.cli.labeled_images import list_images
from cl_prompts.continual import AccuracyMatrix


Output = pytest.CaptureFixture[str]
COLORS = {"owl": (200, 30, 30), "jay": (30, 30, 200), "wren": (30, 200, 30), "crow": (230, 230, 30)}


@pytest.fixture(autouse=True)
def _quiet_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command silences transformers for the rest of its process, which here is that of other tests too."""
    before = logging.get_verbosity()
    monkeypatch.setattr("transformers.utils.logging.set_verbosity_error", lambda: None)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    logging.set_verbosity(before)


def photos(folder: Path, *names: str, count: int = 6, seed: int = 0) -> Path:
    """A folder of image folders: noise around a color for each class."""
    random = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for n in range(count):
            noise = random.integers(-30, 30, (32, 32, 3))
            Image.fromarray((np.array(COLORS[name]) + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{n}.png")
    return folder


def adapter_of(folder: Path, method: str, **settings: Any) -> Path:
    """An adapter that knows owl and jay as classes 7 and 3."""
    build("vit").save_pretrained(folder / "vit")
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "vit")
    config = {**METHODS, **WITH_CLASSIFIER}[method](**settings)
    model = get_prompt_pool_model(ViTModel.from_pretrained(folder / "vit"), config)
    images = list_images(photos(folder / "old", "owl", "jay"))
    pixels = [processor(Image.open(file), return_tensors="pt")["pixel_values"] for of in images.values() for file in of]
    labels = torch.tensor([{"owl": 7, "jay": 3}[name] for name, of in images.items() for _ in of])
    batch = {"pixel_values": torch.cat(pixels), "labels": labels, "sample_ids": torch.arange(len(labels))}
    model.begin_task([7, 3], class_names={7: "owl", 3: "jay"})
    if any(p.requires_grad for p in model.parameters()):
        optimizer = torch.optim.SGD(model.parameter_groups(0.1))
        model.attach_optimizer(optimizer)
        model.train()(**batch).loss.backward()
        optimizer.step()
    model.eval()
    if model.needs_consolidation:
        model.consolidate([batch])
    model.end_task()
    model.save_pretrained(folder / "pool")
    return folder / "pool"


@pytest.mark.parametrize(
    "method",
    ["hash", "coda aligned", "hash discriminant", "none analytic"],
    ids=["trained head", "aligned head", "discriminant head", "ridge head"],
)
def test_learn(method: str, tmp_path: Path, capsys: Output) -> None:
    adapter = adapter_of(tmp_path, method)
    before = {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}
    new, check = photos(tmp_path / "new", "wren", "crow"), photos(tmp_path / "check", *COLORS, count=3, seed=1)
    output = tmp_path / "more"
    command = ["learn", str(new), "--adapter", str(adapter), "--output", str(output), "--check", str(check), "--json"]
    assert main([*command, "--epochs", "2", "--batch-size", "4"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (done["known"], done["new"], done["images"]) == (["owl", "jay"], ["crow", "wren"], 12)
    assert all(0 <= done[name] <= 100 for name in ("known_before", "known_after", "new_after"))
    assert before == {file.name: file.read_bytes() for file in adapter.iterdir() if file.is_file()}, "the old one is kept"
    learned = AutoPromptPoolModel.from_pretrained(output)
    assert learned.adapter.config.state.tasks == [[7, 3], [8, 9]]
    assert learned.adapter.config.state.class_names == {"7": "owl", "3": "jay", "8": "crow", "9": "wren"}
    assert not learned.adapter.config.state.task_open
    # The accuracies are those of the pipeline.
    pipe = PromptPoolPipeline.from_pretrained(output)
    hits = {name: [pipe(file, top_k=1)[0]["label"] == name for file in files] for name, files in list_images(check).items()}
    assert done["new_after"] == pytest.approx(100 * np.mean(hits["wren"] + hits["crow"]))
    assert done["known_after"] == pytest.approx(100 * np.mean(hits["owl"] + hits["jay"]))
    assert main(["evaluate", str(check), "--adapter", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(100 * np.mean(list(hits.values())))
    assert found["by_class"] == {name: pytest.approx(100 * np.mean(row)) for name, row in hits.items()}


def test_one_class_from_its_own_folder(tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = adapter_of(tmp_path, "none", head="discriminant")
    monkeypatch.chdir(tmp_path)
    new = photos(tmp_path / "new", "wren")
    assert main(["learn", str(new / "wren"), "--adapter", str(adapter)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "knew 2 classes: owl, jay"
    assert printed[1].startswith("learned 1 from 6 images")
    assert printed[-1] == "adapter in pool-wren"
    answers = PromptPoolPipeline.from_pretrained("pool-wren")([str(file) for file in (new / "wren").iterdir()], top_k=1)
    assert {answer[0]["label"] for answer in answers} == {"wren"}


@pytest.mark.slow
def test_the_settings_are_those_of_the_adapters_own_run(tmp_path: Path, capsys: Output) -> None:
    adapter = adapter_of(tmp_path, "l2p")
    matrix = AccuracyMatrix()
    matrix.add([90.0], [10])
    state = json.loads((adapter / "adapter_config.json").read_text())["state"]
    record = {"results": {"L2P": matrix.to_dict()}, "weights_sha256": state["weights_sha256"]}
    new = photos(tmp_path / "new", "wren", "crow")
    weights = []
    for number, (settings, words) in enumerate(
        [({"num_train_epochs": 1, "learning_rate": 0.5}, []), ({}, ["--epochs", "1", "--learning-rate", "0.5"]), ({}, [])]
    ):
        (adapter / "results.json").write_text(json.dumps(record | {"settings": settings}))
        output = tmp_path / str(number)
        assert main(["learn", str(new), "--adapter", str(adapter), "--output", str(output), *words]) == 0
        weights.append(AutoPromptPoolModel.from_pretrained(output).adapter.head.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    capsys.readouterr()
    (adapter / "results.json").write_text(json.dumps(record | {"settings": {"num_train_epochs": 10**9}}))
    assert main(["learn", str(new), "--adapter", str(adapter), "--output", str(tmp_path / "endless")]) == 1
    assert "num_train_epochs=1000000000: choose with --epochs" in capsys.readouterr().err


def test_the_new_adapter_names_the_base_that_was_given(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, "none", head="discriminant")
    moved = shutil.move(tmp_path / "vit", tmp_path / "elsewhere")
    new, more = photos(tmp_path / "new", "wren"), tmp_path / "more"
    assert main(["learn", str(new), "--adapter", str(adapter), "--base", str(moved), "--output", str(more)]) == 0
    assert AutoPromptPoolModel.from_pretrained(more).classes == [7, 3, 8]


def test_a_diverged_training_is_one_line(tmp_path: Path, capsys: Output) -> None:
    adapter, new = adapter_of(tmp_path, "l2p"), photos(tmp_path / "new", "wren", "crow")
    words = ["learn", str(new), "--adapter", str(adapter), "--output", str(tmp_path / "more"), "--learning-rate", "1e30"]
    assert main(words) == 1
    assert re.search("cl-prompts: .* lower the learning rate", capsys.readouterr().err)
    assert not (tmp_path / "more").exists()


def test_a_base_that_the_adapter_brings_comes_along(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, "none", head="discriminant")
    shutil.move(tmp_path / "vit", adapter / "base")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    shutil.copy(adapter / "base" / "preprocessor_config.json", adapter)
    new = photos(tmp_path / "new", "wren")
    assert main(["learn", str(new), "--adapter", str(adapter), "--output", str(tmp_path / "more")]) == 0
    shutil.rmtree(adapter)
    assert AutoPromptPoolModel.from_pretrained(tmp_path / "more").classes == [7, 3, 8]


WRONG = {
    "no folder": (lambda new: shutil.rmtree(new), "there is no folder"),
    "known class": (lambda new: photos(new, "owl"), r"knows \['owl'\] already: a task brings new classes"),
    "an empty class": (lambda new: (new / "kite").mkdir(), "the folder of class 'kite' is empty"),
    "a file beside": (lambda new: (new / "notes.txt").touch(), "notes.txt stands beside folders of classes"),
    "no image": (lambda new: (new / "wren" / "notes.txt").touch(), "notes.txt is no image"),
    "deeper": (lambda new: photos(new / "wren", "crow"), "crow is no image"),
    "damaged": (lambda new: (new / "wren" / "0.png").write_bytes(b"no"), r"0.png, cannot be read \(it is no JPEG"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders_are_one_line(case: str, tmp_path: Path, capsys: Output) -> None:
    adapter = adapter_of(tmp_path, "none", head="discriminant")
    new = photos(tmp_path / "new", "wren")
    spoil, message = WRONG[case]
    spoil(new)
    assert main(["learn", str(new), "--adapter", str(adapter), "--output", str(tmp_path / "more")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cl-prompts: ")]
    assert re.search(message, line), line
    assert not (tmp_path / "more").exists()


def test_what_else_is_refused(tmp_path: Path, capsys: Output) -> None:
    adapter = adapter_of(tmp_path, "none", head="discriminant")
    new, check = photos(tmp_path / "new", "wren"), photos(tmp_path / "check", "crow")
    for words, message in (
        ([str(new), "--adapter", str(adapter), "--output", str(adapter)], "exists already"),
        (
            [str(new), "--adapter", str(adapter), "--check", str(check), "--output", str(tmp_path / "x")],
            "neither known nor",
        ),
    ):
        assert main(["learn", *words]) == 1
        assert message in capsys.readouterr().err
    assert main(["evaluate", str(check), "--adapter", str(adapter)]) == 1
    assert "the adapter knows no classes ['crow']" in capsys.readouterr().err
