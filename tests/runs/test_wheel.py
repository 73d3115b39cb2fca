"""From an installed wheel to a taught and shared adapter, without the repository."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest
from PIL import Image
from support.example_runs import few_digits
from support.hub_server import Hub
from support.paths import ROOT


pytest.importorskip("hatchling", reason="hatchling of the extra `test` builds the wheel")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of commands of a new environment: the wheel is installed there, other packages are those of this one."""
    home = wheel.parent / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(home), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return home / "bin"


def ran(words: list[str], folder: Path) -> tuple[str, str]:
    """What a command prints, and what on stderr; it must not fail."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_the_wheel_holds_what_a_run_needs(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    runs = "cl_prompts/runs/"
    assert {f"{runs}recipes/numbers.yaml", f"{runs}benchmarks/cub.yaml", f"{runs}micro_vit/model.safetensors"} <= names
    assert not [name for name in names if not name.startswith(("cl_prompts/", "cl_prompts-"))]
    assert wheel.stat().st_size < 6e6
    (metadata,) = (name for name in names if name.endswith("METADATA"))
    text = ZipFile(wheel).read(metadata).decode()
    assert re.findall(r"^Project-URL: Repository, https://", text, re.MULTILINE)
    assert re.findall(r"\]\((?!https://|#).+?\)", text) == [], "links of the README on a package index"


@pytest.mark.slow
def test_from_training_to_the_hub(installed: Path, hub: Hub, tmp_path: Path) -> None:
    few_digits(tmp_path / "digits of mine")
    line = ["--dataset", "digits of mine", "--tasks", "2", "--num_train_epochs", "1"]
    out, errors = ran([str(installed / "cl-prompts"), "train", *line], tmp_path)
    quiet(out, errors)
    results = tmp_path / "results/digits of mine-apt-seed0"
    assert "cl-prompts train --dataset 'digits of mine' --tasks 2" in (results / "results.md").read_text()
    adapter = str(results / "adapter")

    for name in ("kingfisher", "heron"):
        (tmp_path / "birds" / name).mkdir(parents=True)
        for n in range(4):
            color = (200, 40 * n, 0) if name == "heron" else (0, 40 * n, 200)
            Image.new("RGB", (32, 32), color).save(tmp_path / "birds" / name / f"{n}.png")
    lines = [
        ["learn", "birds", "--adapter", adapter, "--output", "taught", "--json"],
        ["predict", "birds/heron/0.png", "--adapter", "taught", "--json"],
        ["push", "taught", "me/digits-and-birds", "--include-base"],
    ]
    script = f"""
import cl_prompts
from cl_prompts.cli import main

print(cl_prompts.__file__)
for words in {lines}:
    assert main(words) == 0, words
"""
    told = ran([str(installed / "python"), "-c", script], tmp_path)[0].splitlines()
    assert Path(told[0]).is_relative_to(installed.parent)
    learned, predicted = (json.loads(line) for line in told[1:] if line.startswith("{"))
    assert (len(learned["known"]), learned["new"], learned["images"]) == (4, ["heron", "kingfisher"], 8)
    assert predicted["predictions"][0]["label"] == "heron"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(
        hub.repos["me/digits-and-birds"].files()
    )


def quiet(out: str, errors: str) -> None:
    """The screen of a run has the tasks, what was reached, and nothing of other libraries."""
    for noise in ("Warning", "Loading weights", "LOAD REPORT", "examples", "Generating", "Map:", "defaults used"):
        assert noise not in out + errors
    lines = [line for line in out.splitlines() if line and not line.startswith("query cache: ")]
    assert [line.partition(":")[0] for line in lines[:2]] == ["after task 1", "after task 2"]
    known = r"After 2 tasks, apt recognizes [\d.]+ % of the test images of all 4 classes"
    assert re.fullmatch(known + r"; a classifier trained naively, task after task: [\d.]+ %\.", lines[2])
    assert lines[3].startswith("| learner | FAA")
    under = [line for line in lines[4:] if not line.startswith("|")]
    assert [line.partition(" ")[0] for line in under[:3]] == ["FAA:", "Forgetting:", "-"], "a legend, then remarks"
