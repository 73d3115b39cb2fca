"""One file that many write: always whole, and a killed writer's leftover goes with the next write."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest
from support.saving import exit_code, forked

from cl_prompts.runtime import locks
from cl_prompts.runtime.files import staging_file, write_atomically


def write_for_ever(path: Path) -> None:
    while True:
        for letter in "ab":
            write_atomically(path, letter * 100_000)


def killed_while_writing(path: Path) -> None:
    with staging_file(path) as staging:
        staging.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_file_that_several_processes_write_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "a" * 100_000)
    writers = [forked(lambda: write_for_ever(path)) for _ in range(3)]
    found, end = set(), time.monotonic() + 2
    while time.monotonic() < end or len(found) < 2:
        found.add(path.read_text())
    for writer in writers:
        os.kill(writer, signal.SIGKILL)
    assert [exit_code(writer) for writer in writers] == [-signal.SIGKILL] * 3, "a writer failed"
    assert found == {"a" * 100_000, "b" * 100_000}
    write_atomically(path, "last")
    assert os.listdir(tmp_path) == ["results.json"]
    assert path.read_text() == "last"


def test_the_leftover_of_a_killed_writer_is_removed_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    assert exit_code(forked(lambda: killed_while_writing(path))) == -signal.SIGKILL
    (leftover,) = os.listdir(tmp_path)
    (tmp_path / ".results.json.mine").touch()
    with staging_file(path) as staging:
        assert leftover not in os.listdir(tmp_path)
        staging.write_text("first")
        write_atomically(path, "second")
        assert staging.read_text() == "first"
    assert path.read_text() == "first"
    assert sorted(os.listdir(tmp_path)) == [".results.json.mine", "results.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with pytest.raises(ZeroDivisionError), staging_file(path) as staging:
        staging.write_text(f"new {1 / 0}")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_without_locks_a_leftover_is_known_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a network file system that has no locks."""

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    young, old = tmp_path / ".file.1.writing", tmp_path / ".file.2.writing"
    for leftover in (young, old):
        leftover.touch()
    day_before_yesterday = time.time() - 2 * locks.LEFTOVER_SECONDS
    os.utime(old, (day_before_yesterday, day_before_yesterday))
    write_atomically(tmp_path / "file", "content")
    assert sorted(os.listdir(tmp_path)) == [young.name, "file"]


def test_a_lock_excludes_processes_and_leaves_no_file(tmp_path: Path) -> None:
    """Each process counts up in a file that only the lock protects."""
    counter, lock = tmp_path / "counter", tmp_path / "lock"
    counter.write_text("0")

    def count() -> None:
        for _ in range(200):
            with locks.locked(lock):
                counter.write_text(str(int(counter.read_text()) + 1))

    children = [forked(count) for _ in range(4)]
    assert [exit_code(child) for child in children] == [0] * 4
    assert counter.read_text() == "800"
    assert os.listdir(tmp_path) == ["counter"]
