"""Several processes and threads save into one folder at once: one whole adapter is left, and nothing else changes."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.saving import KEPT, adapter, add_foreign_files, answer, exit_code, foreign_files_are_there, forked, loaded
from torch import Tensor

from cl_prompts import PromptPoolModel
from cl_prompts.storage.staging import staging_folder


@pytest.fixture(scope="module")
def models() -> list[PromptPoolModel]:
    """Of equal shapes, so that files of two of them would load together if nobody looked."""
    return [adapter(seed) for seed in range(3)]


def save_on_every_rank(rank: int, ranks: int, store: Path, folders: list[Path], models: list[PromptPoolModel]) -> None:
    """What `torchrun` starts: a barrier, then every rank saves; in every second folder all ranks save the same adapter."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    for number, folder in enumerate(folders):
        dist.barrier()
        models[rank if number % 2 else 0].save_pretrained(folder)
    dist.barrier()


def which(folder: Path, answers: list[Tensor]) -> int:
    """The number of the adapter in a folder."""
    logits = loaded(folder)
    return next(number for number, known in enumerate(answers) if torch.equal(known, logits))


def check_ranks(room: Path, ranks: int, trials: int, over: bool, models: list[PromptPoolModel]) -> None:
    folders = [room / str(trial) / "out" for trial in range(trials)]
    if over:
        models[2].save_pretrained(room / "old")
        add_foreign_files(room / "old")
        for folder in folders:
            shutil.copytree(room / "old", folder)
    children = [
        forked(lambda rank=rank: save_on_every_rank(rank, ranks, room / "store", folders, models)) for rank in range(ranks)
    ]
    assert [exit_code(child) for child in children] == [0] * ranks, "a save raised"
    answers = [answer(model) for model in models]
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", *(KEPT if over else ())}
    for number, folder in enumerate(folders):
        assert which(folder, answers) in (range(ranks) if number % 2 else [0]), number
        assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == files, number
        assert not over or foreign_files_are_there(folder), number
        assert os.listdir(folder.parent) == ["out"], number


@pytest.mark.by_turns(2)
@pytest.mark.parametrize("over", [False, True], ids=["fresh", "over"])
def test_every_rank_saves_after_a_barrier(over: bool, models: list[PromptPoolModel], tmp_path: Path) -> None:
    check_ranks(tmp_path, 2, 30, over, models)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("over", [False, True], ids=["fresh", "over"])
def test_every_rank_saves_very_often(over: bool, ranks: int, models: list[PromptPoolModel], tmp_path: Path) -> None:
    check_ranks(tmp_path, ranks, 500, over, models)


def save_for_ever(model: PromptPoolModel, folder: Path) -> None:
    torch.set_num_threads(1)
    while True:
        model.save_pretrained(folder)


def kill_savers(folder: Path, models: list[PromptPoolModel], kills: int) -> list[int]:
    """Savers are killed at any moment and new ones started, while this process loads; the adapters that were loaded."""
    answers, chance = [answer(model) for model in models], random.Random(0)
    models[2].save_pretrained(folder)
    add_foreign_files(folder)
    savers, found = [forked(lambda model=model: save_for_ever(model, folder)) for model in models[:2]], []
    try:
        for kill in range(kills):
            found.append(which(folder, answers))
            time.sleep(chance.uniform(0, 0.05))
            os.kill(savers[kill % 2], signal.SIGKILL)
            assert exit_code(savers[kill % 2]) == -signal.SIGKILL, "a save raised"
            savers[kill % 2] = forked(lambda model=models[kill % 2]: save_for_ever(model, folder))
    finally:
        for saver in savers:
            os.kill(saver, signal.SIGKILL)
        codes = [exit_code(saver) for saver in savers]
    assert codes == [-signal.SIGKILL] * 2, "a save raised"
    found.append(which(folder, answers))
    models[2].save_pretrained(folder)
    assert which(folder, answers) == 2
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3 + len(KEPT)
    assert foreign_files_are_there(folder)
    assert os.listdir(folder.parent) == [folder.name]
    return found


@pytest.mark.slow
def test_savers_that_are_killed_harm_nobody(models: list[PromptPoolModel], tmp_path: Path) -> None:
    assert {0, 1} <= set(kill_savers(tmp_path / "out", models, 15))


@pytest.mark.slow
def test_many_savers_that_are_killed_harm_nobody(models: list[PromptPoolModel], tmp_path: Path) -> None:
    assert {0, 1} <= set(kill_savers(tmp_path / "out", models, 200))


def in_threads(acts: list[Callable[[], object]]) -> list[Exception]:
    """Run each in a thread of its own, all at once; what they raised."""
    errors: list[Exception] = []
    start = threading.Barrier(len(acts))

    def run(act: Callable[[], object]) -> None:
        start.wait()
        try:
            act()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_save_one_model_and_others(models: list[PromptPoolModel], tmp_path: Path) -> None:
    shared, folder = adapter(5), tmp_path / "out"
    savers = [shared, shared, models[0], models[1]]
    for _ in range(8):
        assert not in_threads([lambda model=model: model.save_pretrained(folder) for model in savers])
        assert any(torch.equal(loaded(folder), answer(model)) for model in savers)
    assert len(os.listdir(folder)) == 3
    assert not shared.peft_config["default"].inference_mode, "saving has changed the model"


def test_files_of_the_user_stay_that_are_written_during_a_save(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    with (folder / "log.txt").open("a") as log:
        inodes = [os.stat(path).st_ino for path in (folder, folder / "log.txt")]
        log.write("before ")
        with staging_folder(folder) as staging:
            (staging / "ours").write_text("new")
            (folder / "notes.txt").write_text("mine")
        log.write("after")
    assert [os.stat(path).st_ino for path in (folder, folder / "log.txt")] == inodes
    assert {path.name: path.read_text() for path in folder.iterdir()} == {
        "ours": "new",
        "log.txt": "before after",
        "notes.txt": "mine",
    }


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_changes(tmp_path: Path) -> None:
    (tmp_path / "out" / "b" / "mine").mkdir(parents=True)

    def save() -> None:
        with staging_folder(tmp_path / "out") as staging:
            for name in "ab":
                (staging / name).touch()

    with pytest.raises(ValueError, match=r"out/b is a folder, where a file has to be written: move it away"):
        save()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "mine", "out"]
