"""Two runs in one results folder: the second is told which process has it, until that process has ended."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.saving import exit_code, forked
from support.small_runs import Stop, StopAt, small_trainer

from cl_prompts.continual import TrainerCallback, TrainerState
from cl_prompts.continual.run_lock import LOCK, FolderInUseError
from cl_prompts.runtime.locks import hold_exclusively, release


def holder(path: Path, act: Callable[[], object] = lambda: None) -> int:
    """A process that holds the lock, does `act`, and waits; its id."""

    def hold() -> None:
        assert isinstance(hold_exclusively(path), int)
        act()
        path.with_name("held").touch()
        while True:
            time.sleep(1)

    child = forked(hold)
    while not path.with_name("held").exists():
        time.sleep(0.01)
    path.with_name("held").unlink()
    return child


def test_the_second_run_names_the_first_and_touches_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, tasks=1, callbacks=[StopAt(3)]).train()
    other = holder(tmp_path / LOCK)
    try:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for resume in (False, True):
            with pytest.raises(FolderInUseError) as refused:
                small_trainer("l2p", tmp_path, tasks=1).train(resume=resume)
            said = str(refused.value)
            assert f"process {other} on {socket.gethostname()} since" in said
            assert f"kill {other}" in said
            assert "\n" not in said
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    finally:
        os.kill(other, signal.SIGKILL)
    assert exit_code(other) == -signal.SIGKILL
    trainer = small_trainer("l2p", tmp_path, tasks=1)
    trainer.train(resume=True)
    assert trainer.progress.task == 1
    assert not (tmp_path / LOCK).exists()


def test_the_lock_ends_with_its_process_and_not_with_a_worker_of_it(tmp_path: Path) -> None:
    """A forked data loader's worker outlives a killed run for seconds."""
    path, worker = tmp_path / "lock", tmp_path / "worker"
    other = holder(path, lambda: worker.write_text(str(forked(lambda: time.sleep(60)))))
    os.kill(other, signal.SIGKILL)
    exit_code(other)
    try:
        descriptor = hold_exclusively(path)
        assert isinstance(descriptor, int)
        release(descriptor)
    finally:
        os.kill(int(worker.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ("", False),
        ("[]", False),
        ('{"pid": 4194999, "host": "HERE", "since": "x"}', False),
        ('{"pid": SELF, "host": "HERE", "since": "x"}', True),
        ('{"pid": 1, "host": "another machine", "since": "x"}', True),
    ],
    ids=["empty", "not ours", "ended", "runs", "elsewhere"],
)
def test_without_locks_the_named_process_decides(
    content: str, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a network file system that has no locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(38, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    path = tmp_path / "lock"
    path.write_text(content.replace("SELF", str(os.getpid())).replace("HERE", socket.gethostname()))
    found = hold_exclusively(path)
    assert isinstance(found, dict) is held
    if isinstance(found, int):
        release(found)


def test_two_trainers_of_one_process_do_not_share_a_folder(tmp_path: Path) -> None:
    class Second(TrainerCallback):
        said = ""

        def on_step_end(self, state: TrainerState, task: Any) -> None:
            with suppress(Stop):
                try:
                    small_trainer("l2p", tmp_path, tasks=1, callbacks=[StopAt(1)]).train()
                except FolderInUseError as error:
                    Second.said = str(error)
            raise Stop

    with pytest.raises(Stop):
        small_trainer("l2p", tmp_path, tasks=1, callbacks=[Second()]).train()
    assert f"kill {os.getpid()}" in Second.said
