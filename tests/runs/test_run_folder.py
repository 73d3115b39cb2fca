"""The example from end to end: what its results folder holds, whose it is, and what a killed run becomes."""

import itertools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.example_runs import TINY, few_digits, finished, matrices, process, tensors
from support.saving import exit_code, forked
from support.small_disk import small_disk
from train_cil import main

from cl_prompts.runs.run_folder import LOCK
from cl_prompts.runtime.locks import hold_exclusively


Run = Callable[..., Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return few_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, data: Path) -> Run:
    def in_this_process(output: Path, *line: str) -> Path:
        arguments = ["--dataset", str(data), *TINY, "--output_dir", str(output), *line]
        monkeypatch.setattr(sys, "argv", ["train_cil.py", *arguments])
        main()
        return output

    return in_this_process


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_same_result(one: Path, other: Path) -> None:
    assert matrices(one) == matrices(other)
    mine, theirs = tensors(one), tensors(other)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_the_folder_is_complete(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "one", "--method", "hash")
    found = {path.name for path in folder.iterdir()}
    assert found == {
        *("run.json", "log.jsonl", "checkpoints", "matrix.csv", "results.json", "results.md", "adapter"),
        *("curves.png", "matrix.png", "selection.png", "reliability.png"),
    }
    assert (folder / "adapter" / "preprocessor_config.json").is_file()
    told = json.loads((folder / "run.json").read_text())
    assert told["arguments"]["method"] == "hash"
    assert told["processes"] == 1
    assert {"stream", "learner", "versions", "machine"} <= set(told)
    content = json.loads((folder / "results.json").read_text())
    assert content["seconds"] > 0
    assert next(iter(content["results"])) == "hash"
    assert {"sequential linear probe", "nearest class mean", "joint linear probe"} <= set(content["results"])
    assert len(content["results"]["hash"]["task_incremental"]) == 2
    page = (folder / "results.md").read_text()
    assert all(
        part in page
        for part in ("nearest class mean", "routing entropy", "task known", "curves.png", "--num_train_epochs 2")
    )
    assert "nearest class mean" in capsys.readouterr().out


@pytest.mark.slow
def test_the_same_run_starts_over_or_reports(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path / "one", "--method", "l2p")
    first, adapter = matrices(folder), tensors(folder)
    before = files(folder)
    capsys.readouterr()
    run(folder, "--method", "l2p", "--resume")
    assert "was complete" in capsys.readouterr().out
    assert files(folder) == before
    run(folder, "--method", "l2p")
    assert matrices(folder) == first
    assert all(torch.equal(adapter[name], tensor) for name, tensor in tensors(folder).items())


def test_a_run_that_failed_before_its_first_checkpoint_leaves_the_folder_free(run: Run, tmp_path: Path) -> None:
    """Else the mend that an error names, a further argument, would be refused."""
    for split, name, number in itertools.product(("train", "test"), ("owl", "jay"), range(4)):
        file = tmp_path / "images" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(file)
    (tmp_path / "images" / "train" / "owl" / "1.png").write_bytes(b"no image")
    line = ("--method", "l2p", "--dataset", str(tmp_path / "images"))
    with pytest.raises(ValueError, match="use on_bad_image='skip'"):
        run(tmp_path / "one", *line)
    assert "run.json" in files(tmp_path / "one")
    run(tmp_path / "one", *line, "--on_bad_image", "skip")
    assert json.loads((tmp_path / "one" / "run.json").read_text())["arguments"]["on_bad_image"] == "skip"
    with pytest.raises(SystemExit, match="holds another run"):
        run(tmp_path / "one", *line)


def test_another_run_is_refused_and_nothing_is_touched(run: Run, tmp_path: Path) -> None:
    folder = run(tmp_path / "one", "--method", "l2p")
    before = files(folder)
    for line, what in (
        (["--method", "l2p", "--learning_rate", "0.1"], r"learning_rate: 0.005 there, 0.1 here"),
        (["--method", "vpt", "--resume"], r"method: 'l2p' there, 'vpt' here"),
    ):
        with pytest.raises(SystemExit, match=f"holds another run \\(.*{what}.*--output_dir"):
            run(folder, *line)
    told = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**told, "stream": "other images"}))
    with pytest.raises(SystemExit, match="stream differs"):
        run(folder, "--method", "l2p")
    (folder / "run.json").unlink()
    with pytest.raises(SystemExit, match=r"no run\.json beside results\.json"):
        run(folder, "--method", "l2p")
    before.pop("run.json")
    assert files(folder) == before


def test_a_foreign_run_file_is_no_free_folder(run: Run, tmp_path: Path) -> None:
    for text in ("{", "[]", "{}", '{"arguments": null}'):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(SystemExit, match=r"run\.json cannot be read"):
            run(tmp_path)


@pytest.mark.slow
def test_a_damaged_result_is_told_and_made_again(run: Run, tmp_path: Path) -> None:
    folder = run(tmp_path / "one", "--method", "l2p")
    before = matrices(folder)
    (folder / "results.json").write_text("{")
    with pytest.raises(SystemExit, match=r"results\.json is damaged \(.*: remove it, the run then continues"):
        run(folder, "--method", "l2p", "--resume")
    (folder / "results.json").unlink()
    told = json.loads((folder / "run.json").read_text())
    told.pop("versions")
    (folder / "run.json").write_text(json.dumps(told))
    run(folder, "--method", "l2p", "--resume")
    assert matrices(folder) == before


@pytest.mark.by_turns(7)
@pytest.mark.parametrize(
    "line",
    [
        ["--method", "ewc", "--learning_rate", "1e-4"],
        ["--method", "er", "--memory_per_class", "2", "--config", "freeze_backbone=true"],
        ["--method", "joint", "--config", "freeze_backbone=true"],
        ["--method", "l2p", "--joint"],
        ["--method", "l2p", "--scenario", "gaussian", "--num_train_epochs", "1"],
        ["--method", "l2p", "--streaming", "--train_images", "16", "16"],
        [
            "--method",
            "coda",
            "--augment",
            "--lr_scheduler_type",
            "coda",
            "--gradient_accumulation_steps",
            "2",
            "--optim",
            "adamw",
        ],
    ],
    ids=lambda line: " ".join(line[1:4]),
)
def test_every_kind_of_run(run: Run, tmp_path: Path, line: list[str]) -> None:
    folder = run(tmp_path / "one", *line)
    learner = matrices(folder)[line[1]]
    assert len(learner["columns"]) == (1 if {"--joint", "gaussian"} & set(line) else 2)
    assert sum(learner["sizes"]) == 16


@pytest.mark.slow
def test_domains_and_data_sets(run: Run, tmp_path: Path, data: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / "both" / name).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "both" / name / f"{split}.parquet").symlink_to(data / f"{split}.parquet")
    classes = {}
    for scenario in ("domain", "datasets"):
        line = ["--dataset", str(tmp_path / "both"), "--method", "l2p", "--scenario", scenario, "--num_train_epochs", "1"]
        folder = run(tmp_path / scenario, *line)
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        classes[scenario] = [len(task) for task in config["state"]["tasks"]]
        assert len(matrices(folder)["nearest class mean"]["columns"]) == 2
    assert classes == {"domain": [4, 4], "datasets": [4, 4]}
    # the same images in both domains: class means, and so the answers, stay what they are
    first, second = matrices(tmp_path / "domain")["nearest class mean"]["columns"]
    assert second == [first[0], first[0]]


@pytest.mark.slow
def test_a_killed_run_goes_on(run: Run, tmp_path: Path, data: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = run(tmp_path / "whole")
        killed = process(data, tmp_path / "killed")
        wait_for_step(tmp_path / "killed", 7)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        assert not (tmp_path / "killed" / "results.json").exists()
        begun = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()[0]
        run(tmp_path / "killed", "--resume")
    finally:
        torch.set_num_threads(threads)
    assert_same_result(whole, tmp_path / "killed")
    lines = (tmp_path / "killed" / "log.jsonl").read_text().splitlines()
    assert lines[0] == begun, "it went on and did not start over: the speed of the first step is the killed process's"
    assert [json.loads(line)["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert_log_is_whole(tmp_path / "killed")


def assert_log_is_whole(folder: Path) -> None:
    """Every line of a complete run is in its log once."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, max(steps) + 1))
    assert [line["task"] for line in lines if "accuracies" in line] == [0, 1]


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(run: Run, tmp_path: Path) -> None:
    """Also while the first one writes its report."""
    folder = run(tmp_path / "one", "--method", "l2p")
    before = files(folder)

    def hold() -> None:
        hold_exclusively(folder / LOCK)
        (tmp_path / "held").touch()
        time.sleep(60)

    other = forked(hold)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(SystemExit, match=f"another run uses .*one \\(process {other} on .*kill {other}"):
            run(folder, "--method", "l2p")
    finally:
        os.kill(other, signal.SIGKILL)
        exit_code(other)
    assert {name: content for name, content in files(folder).items() if name != LOCK} == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [3000, 20_000])
def test_a_full_disk_is_one_line(size: int, run: Run, tmp_path: Path) -> None:
    folder, line = tmp_path / "one", ["--method", "l2p", "--save_steps", "0", "--num_train_epochs", "1"]
    with small_disk(size), pytest.raises(SystemExit, match=r"no room to save .*one/.* \(resume with --resume\)") as full:
        run(folder, *line)
    assert "\n" not in str(full.value)
    assert [path for path in folder.rglob("*") if path.name.startswith(".")] == []
    run(folder, *line, "--resume")
    assert set(matrices(folder)) > {"l2p"}


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    """Wait until so many optimizer steps are in the log."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        lines = (folder / "log.jsonl").read_text().splitlines() if (folder / "log.jsonl").exists() else []
        if any(f'"step": {step},' in line for line in lines):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {seconds} s")


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, data: Path) -> None:
    """Whenever it is killed, in a step, between two files, in a checkpoint, in the report: it ends as if it never was."""
    line = ["--augment", "--memory_size", "8", "--config", "class_mask=none", "--mixed_precision", "bf16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(data, whole, *line)
    seconds = (whole / "results.json").stat().st_mtime - (whole / "run.json").stat().st_mtime
    moments = random.Random(0)
    kills = completions = 0
    while kills < 20 and completions < 40:
        begun = written(killed / "run.json")
        run = process(data, killed, *line, "--resume")
        while run.poll() is None and written(killed / "run.json") == begun:
            time.sleep(0.01)  # it starts
        time.sleep(moments.uniform(0, seconds / 2))
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        run.communicate()
        if (killed / "results.json").exists():
            assert_same_result(whole, killed)
            assert_log_is_whole(killed)
            killed.rename(tmp_path / f"complete-{completions}")
            completions += 1
    assert kills == 20
    finished(data, killed, *line, "--resume")
    assert_same_result(whole, killed)
    assert_log_is_whole(killed)


def written(file: Path) -> int:
    """When a file was written; 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


@pytest.mark.slow
def test_two_processes_run_the_example_as_one(tmp_path: Path, data: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    line = ("--batch_size", "6", "--method", "hash")
    finished(data, tmp_path / "one", *line)
    finished(data, tmp_path / "two", *line, launcher=torchrun)
    one, two = matrices(tmp_path / "one"), matrices(tmp_path / "two")
    for learner, matrix in one.items():
        for ours, theirs in zip(matrix["columns"], two[learner]["columns"], strict=True):
            assert theirs == pytest.approx(ours, abs=100 / 8 + 1e-9), learner  # one image
    counts = [tensors(tmp_path / name)["base_model.pools.prompt_pool.pool.history.counts"] for name in ("one", "two")]
    assert torch.equal(*counts)


@pytest.mark.slow
def test_unreadable_images_stop_the_run_or_are_counted(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import load_dataset

    damaged = tmp_path / "damaged"
    few_digits(damaged_folder(damaged))
    rows = load_dataset("parquet", data_files={"train": str(damaged / "train.parquet")}, split="train")
    table: Any = rows.data.table.to_pydict()
    table["image"][3]["bytes"] = b"no image"
    type(rows).from_dict(table, features=rows.features).to_parquet(str(damaged / "train.parquet"))
    line = ["--dataset", str(damaged), "--method", "l2p", "--num_train_epochs", "1"]
    with pytest.raises(Exception, match="on_bad_image"):
        run(tmp_path / "stopped", *line)
    folder = run(tmp_path / "skipped", *line, "--on_bad_image", "skip")
    assert "1 images could not be read" in capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text())["settings"]["skipped"] == 1


def damaged_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder
