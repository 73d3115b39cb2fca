"""What a newcomer types first: the README's commands in one folder, and mistakes in them."""

import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from support.documentation_blocks import ROOT
from support.documentation_commands import commands
from support.example_runs import few_digits
from train_cil import main

from cl_prompts.runs import MICRO_VIT, RECIPES
from cl_prompts.runs.arguments import read_arguments


QUICK = ["--num_train_epochs", "1", "--batch_size", "64"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of parquet files, like a data set of somebody's own."""
    return few_digits(tmp_path / "my photos")


def readme_runs() -> list[list[str]]:
    """Arguments of the training commands of the README, in order."""
    blocks = (ROOT / "README.md").read_text().split("```sh\n")[1:]
    lines = [words for block in blocks for words in commands(block.partition("```")[0])]
    return [words[3:] for words in lines if words[:3] == ["accelerate", "launch", "examples/train_cil.py"]]


@pytest.mark.slow
def test_the_readmes_commands_in_order(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both run in one folder; the second one's model and images are replaced by ours."""
    monkeypatch.chdir(tmp_path)
    first, second = readme_runs()
    assert first == []
    places = {"google/vit-base-patch16-224-in21k": str(MICRO_VIT), "path/to/images": str(photos)}
    words = [places.get(word, word) for word in second]
    words[words.index("--tasks") + 1] = "2"
    assert [word for word in words if word.startswith("--")] == ["--model", "--dataset", "--tasks"]
    for line in (QUICK, [*words, *QUICK]):
        monkeypatch.setattr(sys, "argv", ["train_cil.py", *line])
        main()
    complete = {folder.name for folder in Path("results").iterdir() if (folder / "results.json").is_file()}
    assert complete == {"numbers-layer_grouped-seed0", "my photos-apt-seed0"}


def test_images_without_a_recipe_take_the_settings_for_photographs(photos: Path) -> None:
    recipe = yaml.safe_load((RECIPES / "photos.yaml").read_text())
    assert "dataset" not in recipe, "it is for images that the user names"
    _, training = read_arguments(["--dataset", str(photos)])
    assert (training.num_train_epochs, training.batch_size) == (recipe["num_train_epochs"], recipe["batch_size"])
    assert training.output_dir == "results/my photos-apt-seed0"
    _, training = read_arguments(["--dataset", "a/birds:small", "b/cars", "--scenario", "datasets", "--seed", "3"])
    assert training.output_dir == "results/birds-small-cars-apt-seed3"
    _, training = read_arguments(["--dataset", str(photos), "--recipe", "digits"])
    assert training.output_dir == "results/digits-hash-seed0"
    assert read_arguments(["--dataset", "digits"])[1].output_dir == "results/digits-hash-seed0"
    assert read_arguments([])[1].output_dir == "results/numbers-layer_grouped-seed0"


MISTAKES = {
    "no such folder": (["--dataset", "path/to/images"], "path/to/images"),
    "no test split": (["--dataset", "train only"], "add a test split, or use --held_out 0.2"),
    "too many tasks": (["--tasks", "40"], "40"),
    "a misspelt setting": (["--config", "pool_sise=20"], "pool_sise"),
    "a misspelt model": (["--model", "no/such-model"], "no/such-model"),
    "no recipe": (["--recipe", "digitz"], "no recipe 'digitz'"),
    "a recipe that is no YAML": (["--recipe", "bad.yaml"], "bad.yaml cannot be read as YAML"),
    "a recipe that holds no settings": (["--recipe", "list.yaml"], "list.yaml holds no settings"),
    "a recipe of bytes": (["--recipe", "bytes.yaml"], "bytes.yaml cannot be read as YAML"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "train only")
    for file in Path("train only").rglob("test*"):
        file.unlink()
    Path("bad.yaml").write_text("method: [l2p")
    Path("list.yaml").write_text("- method")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00")
    words, message = MISTAKES[case]
    line = [
        *([] if "--dataset" in words else ["--dataset", str(photos)]),
        *([] if "--tasks" in words else ["--tasks", "2"]),
        *words,
        *QUICK,
    ]
    monkeypatch.setattr(sys, "argv", ["train_cil.py", *line])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = str(stopped.value.code)
    assert message in said
    assert len(said.splitlines()) == 1
    assert not os.path.exists("results") or not any(Path("results").rglob("run.json"))
