"""The command: what it prints, and that every error is one line."""

import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file
from support.adapters import learn
from support.families import build
from support.hub_server import Hub
from support.methods import METHODS
from support.paths import ROOT
from transformers import ViTImageProcessor, ViTModel
from transformers.utils import logging

from cl_prompts import PromptPoolPipeline, get_prompt_pool_model
from cl_prompts.cli import main
from cl_prompts.continual import AccuracyMatrix
from cl_prompts.sharing.inspect import describe_adapter


Output = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quiet_library() -> Iterator[None]:
    """The command silences transformers for the rest of its process, which here is that of other tests too."""
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of two tasks, its base, and what a training run leaves beside it."""
    folder = tmp_path_factory.mktemp("run")
    build("vit").save_pretrained(folder / "vit")
    model = get_prompt_pool_model(ViTModel.from_pretrained(folder / "vit"), METHODS["hash"]())
    learn(model, [7, 3])
    learn(model, [1, 5], seed=1)
    model.adapter.config.state.class_names = {"7": "owl", "1": "jay"}
    model.save_pretrained(folder / "pool")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "pool")
    matrix = AccuracyMatrix()
    matrix.add([90.0], [10])
    matrix.add([70.0, 80.0], [10, 10])
    state = json.loads((folder / "pool" / "adapter_config.json").read_text())["state"]
    results = {"results": {"Hash": matrix.to_dict()}, "weights_sha256": state["weights_sha256"]}
    (folder / "pool" / "results.json").write_text(json.dumps(results))
    return folder / "pool"


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """The adapter, to be damaged."""
    return Path(shutil.copytree(adapter, tmp_path / "copy"))


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    names = []
    for number in range(5):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 40), (50 * number, 100, 200)).save(file)
        names.append(str(file))
    return names


def complaint(output: Output) -> str:
    """The one line on stderr."""
    printed = output.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("cl-prompts: ")
    return line.removeprefix("cl-prompts: ")


def test_predict(adapter: Path, images: list[str], capsys: Output) -> None:
    assert main(["predict", *images, "--adapter", str(adapter), "--top-k", "2", "--batch-size", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    answers = PromptPoolPipeline.from_pretrained(adapter)(images, top_k=2)
    expected = [f"{i}  {a['score']:6.1%}  {a['label']}" for i, row in zip(images, answers, strict=True) for a in row]
    assert printed.out.splitlines() == expected


@pytest.mark.parametrize(("threshold", "marks"), [(-1e6, True), (1e6, False)])
def test_predict_unknown(threshold: float, marks: bool, copy: Path, images: list[str], capsys: Output) -> None:
    asked = ["predict", images[0], "--adapter", str(copy), "--top-k", "1"]
    assert main([*asked, "--unknown", "flag"]) == 1
    assert "needs a threshold" in complaint(capsys)
    content = json.loads((copy / "adapter_config.json").read_text())
    content["state"]["novelty_threshold"] = threshold
    (copy / "adapter_config.json").write_text(json.dumps(content))
    assert main([*asked, "--unknown", "flag"]) == main([*asked, "--unknown", "refuse"]) == 0
    flagged, refused = capsys.readouterr().out.splitlines()
    assert flagged.endswith("  (unknown?)") == marks
    assert refused.endswith("  none of the classes") == marks
    assert main([*asked, "--unknown", "refuse", "--json"]) == 0
    assert bool(json.loads(capsys.readouterr().out)["predictions"]) != marks


def test_predict_for_programs(adapter: Path, images: list[str], capsys: Output) -> None:
    base = str(adapter.with_name("vit"))
    assert main(["predict", *images, "--adapter", str(adapter), "--base", base, "--device", "cpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert [row["predictions"] for row in rows] == PromptPoolPipeline.from_pretrained(adapter)(images)


def test_a_bad_image_beside_good_ones(adapter: Path, images: list[str], tmp_path: Path, capsys: Output) -> None:
    (tmp_path / "bad.png").write_text("no image")
    bad = [str(tmp_path / "bad.png"), str(tmp_path / "none.png")]
    mixed = [images[0], bad[0], images[1], bad[1]]
    assert main(["predict", *mixed, "--adapter", str(adapter), "--top-k", "1", "--batch-size", "2"]) == 1
    printed = capsys.readouterr()
    assert [line.split("  ")[0] for line in printed.out.splitlines()] == images[:2]
    assert [line.split()[1] for line in printed.err.splitlines()] == [bad[0], "there"]
    assert main(["predict", *bad, "--adapter", str(adapter)]) == 1
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 2)


def test_a_warning_is_a_line_too(copy: Path, adapter: Path, images: list[str], capsys: Output) -> None:
    base = build("vit", seed=1)
    base.save_pretrained(copy / "other")
    assert main(["predict", images[0], "--adapter", str(copy), "--base", str(copy / "other")]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 4
    assert printed.err.startswith("cl-prompts: warning: the adapter was trained on a base with fingerprint")
    assert len(printed.err.splitlines()) == 1


def test_inspect(adapter: Path, capsys: Output) -> None:
    assert main(["inspect", str(adapter)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for line in (
        "method    Hash: one pool of prompts for all tasks, a router per task, and a history of how often prompts were "
        "used.",
        "paper     https://arxiv.org/abs/2601.20894",
        f"base      {adapter.with_name('vit')}",
        "          ViTModel, 3 blocks of width 32, 4 heads; images 32x32",
        "head      linear, reads cls",
        "tasks     2",
        "  1: owl, 3",
        "  2: jay, 5",
        "  pool_size = 6",
        "  top_k = 2",
        "  layers = [0, 2]",
        "  head: 132 numbers, 528 bytes",
        "figures   Hash: FAA 75.0, CAA 82.5, forgetting 20.0, when just learned 85.0",
    ):
        assert line in printed.out.splitlines(), line


def test_inspect_for_programs(adapter: Path, capsys: Output) -> None:
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == describe_adapter(adapter)
    assert facts["tasks"] == [
        [{"id": 7, "name": "owl"}, {"id": 3, "name": None}],
        [{"id": 1, "name": "jay"}, {"id": 5, "name": None}],
    ]
    assert facts["figures"]["Hash"]["faa"] == 75.0
    assert facts["format_version"] == 1


def test_figures_of_other_weights_are_not_shown(copy: Path) -> None:
    assert describe_adapter(copy)["figures"]
    results = json.loads((copy / "results.json").read_text()) | {"weights_sha256": "of an earlier training"}
    (copy / "results.json").write_text(json.dumps(results))
    assert describe_adapter(copy)["figures"] == {}


@pytest.mark.parametrize("name", ["coda", "dualprompt prototype", "none"])
def test_sizes_are_those_of_the_tensors(name: str, tmp_path: Path, capsys: Output) -> None:
    model = get_prompt_pool_model(build("vit"), METHODS[name](modules_to_save=["layernorm"]))
    model.begin_task([0, 1])
    model.end_task()
    model.save_pretrained(tmp_path)
    facts = describe_adapter(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert facts["numbers"] == sum(t.numel() for t in tensors.values())
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(part["tensors"] for part in facts["parts"].values()) == len(tensors)
    assert facts["parts"]["head"] == {"tensors": 2, "numbers": 2 * 32 + 2, "bytes": 4 * (2 * 32 + 2)}
    assert facts["parts"]["modules of the base"] == {"tensors": 2, "numbers": 64, "bytes": 256}
    assert main(["inspect", str(tmp_path)]) == 0
    assert f"size      {facts['numbers']:,} numbers" in capsys.readouterr().out


def test_by_hub_id(hub: Hub, adapter: Path, images: list[str], capsys: Output) -> None:
    api = HfApi()
    api.create_repo("me/pool", private=True)
    api.upload_folder(repo_id="me/pool", folder_path=adapter, ignore_patterns="README.md")
    first = api.model_info("me/pool").sha
    api.delete_file("results.json", "me/pool")
    assert main(["inspect", "me/pool", "--json"]) == 0
    newest = json.loads(capsys.readouterr().out)
    assert newest == describe_adapter(adapter) | {"adapter": "me/pool", "figures": {}}
    assert main(["inspect", "me/pool", "--revision", first, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"] == describe_adapter(adapter)["figures"]
    base = str(adapter.with_name("vit"))
    assert main(["predict", images[0], "--adapter", "me/pool", "--base", base, "--top-k", "1"]) == 0
    there = capsys.readouterr().out
    assert main(["predict", images[0], "--adapter", str(adapter), "--top-k", "1"]) == 0
    assert there == capsys.readouterr().out
    assert main(["predict", images[0], "--adapter", "me/pool"]) == 1
    assert "which is no Hub id: load the base yourself" in complaint(capsys)
    assert main(["inspect", "me/none"]) == 1
    assert complaint(capsys).startswith(
        "there is no me/none for you: check the name; if it is private, run `hf auth login`"
    )
    assert main(["inspect", "me/pool", "--revision", "other"]) == 1
    assert complaint(capsys).startswith("me/pool has no revision 'other'")


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """An adapter whose config was changed."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        content = change(config)
        (folder / "adapter_config.json").write_text(json.dumps(config if content is None else content))

    return damage


def trap(folder: Path) -> str:
    """A module that leaves a file if it is ever imported."""
    (folder / "trap.py").write_text(f"open({str(folder / 'sprung')!r}, 'w').close()\nclass Model: pass\n")
    return "trap"


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json in"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors in"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "truncated or no JSON"),
    "a list": (edited(lambda c: [c]), "holds no JSON object"),
    "truncated weights": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"123"), "truncated or no safetensors"),
    "unknown method": (edited(lambda c: c.update(method="trap.Model")), "unknown method 'trap.Model'"),
    "wrong kind": (edited(lambda c: c.update(pool_size="many")), "pool_size='many'"),
    "tasks": (edited(lambda c: c["state"].update(tasks=[[1, 1]])), "lists of distinct class ids"),
    "names": (edited(lambda c: c["state"].update(class_names=["owl"])), "`state.class_names` must map"),
    "format": (edited(lambda c: c["state"].update(format_version=99)), "format version 99"),
    "results": (lambda f: (f / "results.json").write_text('{"results": {"a": {"columns": [[NaN]]}}}'), "results.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case: str, copy: Path, images: list[str], capsys: Output) -> None:
    damage, message = DAMAGE[case]
    damage(copy)
    assert main(["inspect", str(copy)]) == 1
    assert message in complaint(capsys)
    if case != "results":
        assert main(["predict", *images, "--adapter", str(copy)]) == 1
        assert message in complaint(capsys)


def test_nothing_of_a_strangers_file_is_run(copy: Path, images: list[str], capsys: Output, monkeypatch: Any) -> None:
    """Neither code nor what steers a terminal."""
    monkeypatch.syspath_prepend(copy)
    mapping = {"base_model_class": "Model", "parent_library": trap(copy)}
    edited(lambda c: c.update(auto_mapping=mapping, base_model_name_or_path=str(copy)))(copy)
    edited(lambda c: c["state"].update(class_names={"7": "\x1b]0;title\x07\x1b[31mowl\n  9: cuckoo"}))(copy)
    assert main(["inspect", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert r"  1: \x1b]0;title\x07\x1b[31mowl\n  9: cuckoo, 3" in printed.splitlines()
    assert main(["predict", *images, "--adapter", str(copy)]) == 1
    assert "'Model', which transformers does not have" in complaint(capsys)
    assert not (copy / "sprung").exists()
    assert "trap" not in sys.modules
    assert main(["predict", images[0], "--adapter", str(copy), "--base", str(copy.parent / "none")]) == 1
    assert "\x1b" not in complaint(capsys)


def test_inspect_loads_no_base(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    edited(lambda c: c.update(base_model_name_or_path="nobody/nothing", revision="abc"))(copy)
    assert main(["inspect", str(copy)]) == 0
    assert "base      nobody/nothing at abc" in capsys.readouterr().out.splitlines()


ERRORS: dict[str, tuple[list[str], str]] = {
    "top-k": (["--top-k", "0"], "--top-k 0 must be at least 1"),
    "batch size": (["--batch-size", "-1"], "--batch-size -1 and"),
    "no device": (["--device", "banana"], "device='banana' cannot be used here"),
    "no base": (["--base", "./none"], "none"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case: str, adapter: Path, images: list[str], capsys: Output) -> None:
    arguments, message = ERRORS[case]
    assert main(["predict", *images, "--adapter", str(adapter), *arguments]) == 1
    assert message in complaint(capsys)


def test_wrong_arguments_show_the_usage(capsys: Output) -> None:
    for arguments in ([], ["predict"], ["predict", "a.png"], ["inspect"], ["push", "x"], ["fly"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "usage: cl-prompts" in capsys.readouterr().err


def test_a_reader_that_leaves(adapter: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `cl-prompts ... | head`: no complaint, now or when the process ends."""
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["inspect", str(adapter)]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_the_installed_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert pkgutil.resolve_name(project["scripts"]["cl-prompts"]) is main


def test_push(hub: Hub, adapter: Path, images: list[str], capsys: Output) -> None:
    assert main(["push", str(adapter), "me/pool"]) == 1
    assert "--base-model-id" in complaint(capsys)
    assert "me/pool" not in hub.repos
    api = HfApi()
    api.create_repo("me/vit")
    api.upload_folder(repo_id="me/vit", folder_path=adapter.with_name("vit"))
    options = ["--private", "--message", "Two tasks", "--base-model-id", "me/vit", "--license", "apache-2.0"]
    assert main(["push", str(adapter), "me/pool", *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{hub.url}/me/pool/commit/")
    info = api.model_info("me/pool")
    assert (info.private, info.card_data.license) == (True, "apache-2.0")
    assert api.list_repo_commits("me/pool")[0].title == "Two tasks"
    for source in (str(adapter), "me/pool"):
        assert main(["predict", *images, "--adapter", source]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert main(["push", str(adapter), "me/pool", "--base-model-id", "me/vit", "--create-pr"]) == 0
    assert "/me/pool/discussions/" in capsys.readouterr().out
    wrong = ["push", str(adapter), "me/pool", "--base-model-id", "me/vit", "--token", "hf_nobody"]
    assert main(wrong) == 1
    assert "hf auth login" in complaint(capsys)
    assert main(["push", str(adapter.with_name("none")), "me/pool"]) == 1
    assert "none does not exist" in complaint(capsys)


LIGHT = """
import sys
from contextlib import suppress
from cl_prompts.cli import main

def imported():
    return {"torch", "transformers", "peft", "numpy", "PIL", "huggingface_hub", "datasets"} & set(sys.modules)

for words in (["--help"], ["--version"], ["predict", "--help"], ["predict"], ["unknown"], ["inspect", "--help"]):
    with suppress(SystemExit):
        main(words)
    assert not imported(), words
for options in ([], ["--json"]):
    assert main(["inspect", sys.argv[1], *options]) == 0
assert imported() <= {"numpy"}, imported()
assert main(["inspect", "nobody/nothing"]) == 1
assert imported() <= {"numpy", "huggingface_hub"}, imported()
"""


def test_help_mistakes_and_inspect_import_no_torch(adapter: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, str(adapter)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "figures   Hash: FAA 75.0" in done.stdout
