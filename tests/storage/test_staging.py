"""A save that is cut short anywhere leaves the old adapter or the new one, whole. Real processes, really killed."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import build
from support.processes import in_a_new_process
from support.saving import (
    KEPT,
    adapter,
    add_foreign_files,
    answer,
    class_names,
    exit_code,
    foreign_files_are_there,
    forked,
    in_child,
    loaded,
)
from torch import Tensor

from cl_prompts import L2PConfig, PromptPoolModel
from cl_prompts.storage.declared import CONFIG_FILE, WEIGHTS_FILE
from cl_prompts.storage.staging import COMPLETE, PREFIX, finish_interrupted_save


# Everything Python does to the file system is announced here before it happens; what safetensors' Rust does is not, so
# the size limit below cuts its writes.
WATCHED = {"os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.copyfile", "shutil.rmtree", "open"}
# ---- the child processes


def killed_at(step: int, folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        # rmtree names files relative to an open folder
        if event in WATCHED and (str(folder) in str(args[0]) or not str(args[0]).startswith("/")):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return watch


def cut_at_event(model: PromptPoolModel, target: Path, step: int) -> int:
    def act() -> None:
        sys.addaudithook(killed_at(step, target.parent))
        model.save_pretrained(target)

    return in_child(act)


def cut_at_size(model: PromptPoolModel, target: Path, size: int, *, deadly: bool) -> int:
    """No file may grow past `size`: the system kills the writer, or its write fails as on a full disk."""

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        model.save_pretrained(target)

    return in_child(act)


def found(target: Path, answers: dict[str, Tensor]) -> str:
    if not target.exists():
        return "none"
    try:
        model = PromptPoolModel.from_pretrained(build("vit"), target)
    except ValueError as error:
        return str(error)
    logits, names = answer(model), class_names(model)
    whole = (name for name, known in answers.items() if torch.equal(logits, known) and names == class_names(MODELS[name]))
    return next(whole, "neither")


def trial(room: Path, start: Path | None, cut: Callable[[Path], int], answers: dict[str, Tensor]) -> dict[str, Any]:
    """Cut a save short, look at what is there, save again, look at what is left over."""
    shutil.rmtree(room, ignore_errors=True)
    target = room / "adapter"
    room.mkdir()
    if start is not None:
        shutil.copytree(start, target)
        add_foreign_files(target)
    code = cut(target)
    result: dict[str, Any] = {"code": code, "found": found(target, answers)}
    result["kept"] = start is None or foreign_files_are_there(target)
    MODELS["next"].save_pretrained(target)
    result["next"] = found(target, answers)
    result["left over"] = sorted(p.name for p in room.iterdir() if p != target)
    result["files"] = sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file())
    return result


MODELS: dict[str, PromptPoolModel] = {}


def helper(room: Path) -> None:
    torch.set_num_threads(1)  # a fork has no thread pool
    MODELS.update({name: adapter(seed) for seed, name in enumerate(("old", "new", "next"))})
    answers = {name: answer(model) for name, model in MODELS.items()}
    old = room / "old"
    MODELS["old"].save_pretrained(old)
    size = (old / "adapter_model.safetensors").stat().st_size
    new, place = MODELS["new"], room / "place"
    results: dict[str, list[dict[str, Any]]] = {"over": [], "fresh": [], "killed writing": [], "failed writing": []}
    for name, start in (("over", old), ("fresh", None)):
        while not results[name] or results[name][-1]["code"]:
            step = len(results[name]) + 1
            results[name].append(trial(place, start, lambda t, n=step: cut_at_event(new, t, n), answers))
    for name in ("killed writing", "failed writing"):
        for limit in (8, size // 2, size - 1):
            deadly = name == "killed writing"
            results[name].append(trial(place, old, lambda t, n=limit, d=deadly: cut_at_size(new, t, n, deadly=d), answers))
    (room / "results.json").write_text(json.dumps(results | {"meanwhile": loads_while_saving(old, answers)}))


def loads_while_saving(target: Path, answers: dict[str, Tensor]) -> list[str]:
    """What was found, load after load, while another process saved in turns."""

    def save_in_turns() -> None:
        while True:
            for name in ("new", "old"):
                MODELS[name].save_pretrained(target)

    writer = forked(save_in_turns)
    states: list[str] = []
    try:
        while len(states) < 15 or len(set(states)) < 2:
            states.append(found(target, answers))
    finally:
        os.kill(writer, signal.SIGKILL)
        assert exit_code(writer) == -signal.SIGKILL, "the writer failed"
    return states


# ---- what became of them


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    room = tmp_path_factory.mktemp("saving")
    in_a_new_process(helper, room)
    return json.loads((room / "results.json").read_text())  # type: ignore[no-any-return]


def assert_recovers(results: list[dict[str, Any]], foreign: bool) -> None:
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", *(sorted(KEPT) if foreign else [])]
    for number, result in enumerate(results, 1):
        assert result["kept"], (number, result)
        assert (result["next"], result["left over"], result["files"]) == ("next", [], files), (number, result)


@pytest.mark.xdist_group("saving")
def test_a_killed_save_leaves_the_old_adapter_or_the_new(results: dict[str, list[dict[str, Any]]]) -> None:
    over = results["over"]
    assert [r["code"] for r in over] == [-signal.SIGKILL] * (len(over) - 1) + [0]
    states = [r["found"] for r in over]
    swapped = states.index("new")
    assert states == ["old"] * swapped + ["new"] * (len(states) - swapped)
    # It was killed before and after the swap, often enough to have met every step.
    assert swapped > 10
    assert len(states) - swapped > 3
    assert_recovers(over, foreign=True)


@pytest.mark.xdist_group("saving")
def test_a_killed_save_into_a_fresh_folder_leaves_none_or_all(results: dict[str, list[dict[str, Any]]]) -> None:
    fresh = results["fresh"]
    assert [r["code"] for r in fresh] == [-signal.SIGKILL] * (len(fresh) - 1) + [0]
    states = [r["found"] for r in fresh]
    swapped = states.index("new")
    assert states == ["none"] * swapped + ["new"] * (len(states) - swapped)
    assert swapped > 5
    assert_recovers(fresh, foreign=False)


@pytest.mark.xdist_group("saving")
@pytest.mark.parametrize(("name", "code"), [("killed writing", -signal.SIGXFSZ), ("failed writing", 1)])
def test_a_write_cut_short_leaves_the_old_adapter(results: dict[str, list[dict[str, Any]]], name: str, code: int) -> None:
    assert [(r["code"], r["found"]) for r in results[name]] == [(code, "old")] * 3
    assert_recovers(results[name], foreign=True)


def test_a_reader_finishes_a_save_that_was_complete(tmp_path: Path) -> None:
    """The config has moved already, the weights have not."""
    first, second, target = adapter(1), adapter(2), tmp_path / "adapter"
    first.save_pretrained(target)
    second.save_pretrained(tmp_path / "second")
    os.rename(tmp_path / "second", target / f"{PREFIX}0{COMPLETE}")
    os.replace(target / f"{PREFIX}0{COMPLETE}" / CONFIG_FILE, target / CONFIG_FILE)
    assert torch.equal(loaded(target), answer(second))
    assert sorted(os.listdir(target)) == ["README.md", CONFIG_FILE, WEIGHTS_FILE]


def test_a_reader_leaves_other_folders_alone(tmp_path: Path) -> None:
    for name in ("adapter", "adapter/.cl_prompts", f"adapter/{PREFIX}1.saving", f"{PREFIX}2.saving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    before = sorted(tmp_path.rglob("*"))
    finish_interrupted_save(tmp_path / "adapter")
    finish_interrupted_save(tmp_path / "none")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "adapter"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"adapter is a file: name a folder"):
        adapter(1).save_pretrained(path)
    assert path.read_text() == "mine"
    assert os.listdir(tmp_path) == ["adapter"]
    with pytest.raises(ValueError, match=r"adapter is a file: name the folder that holds adapter_config.json"):
        loaded(path)


def test_pickle_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"safe_serialization=False.*safetensors only"):
        adapter(1).save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not os.listdir(tmp_path)


def test_through_a_link(tmp_path: Path) -> None:
    """The link stays a link; the folder behind it is replaced."""
    real, link = tmp_path / "disk" / "adapter", tmp_path / "link"
    adapter(1).save_pretrained(real)
    link.symlink_to(real)
    second = adapter(2)
    second.save_pretrained(link)
    assert link.is_symlink()
    for path in (real, link):
        assert torch.equal(loaded(path), answer(second))
    assert os.listdir(real.parent) == ["adapter"]
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = adapter(1)
    for path in ("adapter", "deep/er", Path("adapter") / ".." / "adapter"):
        model.save_pretrained(path)
        assert torch.equal(loaded(Path(path)), answer(model))
    assert sorted(os.listdir(tmp_path)) == ["adapter", "deep"]


def test_into_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths go on meaning the same."""
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    monkeypatch.chdir(folder / "sub")
    model = adapter(1)
    model.save_pretrained("..")
    assert Path.cwd() == folder / "sub"
    os.chdir("..")
    second = adapter(2)
    second.save_pretrained(".")
    assert Path.cwd() == folder
    assert torch.equal(loaded(Path(".")), answer(second))
    assert os.listdir(tmp_path) == ["run"]


def test_linked_copies_are_not_written_through(tmp_path: Path) -> None:
    """A backup made of hard links keeps its content."""
    model, target, backup = adapter(1), tmp_path / "adapter", tmp_path / "backup"
    model.save_pretrained(target)
    add_foreign_files(target)
    shutil.copytree(target, backup, copy_function=os.link)
    before = {p: p.read_bytes() for p in backup.rglob("*") if p.is_file()}
    adapter(2).save_pretrained(target)
    assert {p: p.read_bytes() for p in backup.rglob("*") if p.is_file()} == before
    assert torch.equal(loaded(backup), answer(model))
    assert foreign_files_are_there(target)


def test_other_adapters_of_a_folder_stay(tmp_path: Path) -> None:
    model = adapter(1)
    model.add_adapter("second", L2PConfig(pool_size=4, top_k=2))
    model.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "second" / "adapter_model.safetensors"
    before = weights.read_bytes()
    with torch.no_grad():
        for parameter in model.base_model.pools.prompt_pool.parameters():
            parameter.add_(1)
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["default"])
    assert weights.read_bytes() == before
    assert torch.equal(loaded(tmp_path / "adapter"), answer(model))


@pytest.mark.xdist_group("saving")
def test_loading_while_another_process_saves(results: dict[str, Any]) -> None:
    """A load reads two files; a save between the two makes it start again."""
    assert set(results["meanwhile"]) == {"old", "new"}


def test_whoever_may_look_into_the_folder_may_read_its_files(tmp_path: Path) -> None:
    adapter(0).save_pretrained(tmp_path / "pool")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "pool").iterdir()}
    assert set(modes.values()) == {(tmp_path / "pool").stat().st_mode & 0o666}, modes


@pytest.mark.parametrize("size", [8, 3000])
def test_a_full_disk_is_one_line_that_says_what_to_do(size: int, tmp_path: Path) -> None:
    """A limit on file sizes is what a process can be given of a full disk: it cuts the card, and the weights."""
    target, new = tmp_path / "pool", adapter(1)
    adapter(0).save_pretrained(target)
    before = {path: path.read_bytes() for path in target.iterdir()}

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            new.save_pretrained(target)
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            said = f"no room to save {target} (File too large): free some and save again; what was there is unharmed"
            os._exit(0 if error.args[1] == said and "\n" not in str(error) else 3)
        os._exit(4)

    assert in_child(act) == 0
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    assert list(tmp_path.iterdir()) == [target]
