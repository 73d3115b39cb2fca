"""Saving several files so that readers find those of the old save or those of the new one, never a mixture.

A save has three steps:

1. The writer fills a staging folder of its own: inside the target folder, or beside it if there is no target yet.
2. The staging folder is renamed. Where there is no target, it becomes the target, and the save is done. Else it gets the
   ending `.complete`, inside the target: from now on the save counts.
3. Its files are moved over those of the target, one by one. Nothing else in the target is touched.

A process killed in step 2 or before leaves the old files. One killed in step 3 leaves a complete folder, whose files the
next reader or writer moves (`finish_interrupted_save`). Writers take turns in steps 2 and 3, by a lock in the target; of
several writers the last one wins. Each writer holds a second lock from the beginning to the end of its save, so that the
staging folder of a killed writer can be told from that of a living one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from cl_prompts.runtime.disk_full import explain_disk_full
from cl_prompts.runtime.files import sync_to_disk
from cl_prompts.runtime.locks import hold_leftover, locked, release
from cl_prompts.storage.declared import CONFIG_FILE


T = TypeVar("T")
PREFIX = ".cl_prompts-"  # then the id of the save and one of the endings
ALIVE, STAGING, COMPLETE = ".lock", ".saving", ".complete"
TURN = ".cl_prompts.lock"  # held by the writer that moves its files into the folder
ATTEMPTS = 50  # a process that saves without a pause leaves half of the reads alone


@contextmanager
def staging_folder(folder: str | os.PathLike[str], inputs: Iterable[str] = ()) -> Iterator[Path]:
    """An empty folder to write to; its files replace those of `folder` together when the block ends without an error.

    Args:
        folder: the target; made if it does not exist. Files of other names stay untouched.
        inputs: files of the target, as glob patterns, that are copied into the staging folder for the block to read. Those
            that the block does not write again stay as they are.

    Raises:
        ValueError: `folder` is a file, or has a folder where the block wrote a file.
        OSError: the disk is full. The files of the last save are kept.
    """
    target = Path(folder).resolve()
    if target.is_file():
        raise ValueError(f"{folder} is a file: name a folder to save into")
    with explain_disk_full(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        with suppress(OSError):  # it may be read-only
            _remove_leftovers(target.parent)
        place = target if target.is_dir() else target.parent
        name = f"{PREFIX}{uuid4().hex}"
        with locked(place / f"{name}{ALIVE}"), _new_folder(place / f"{name}{STAGING}") as staging:
            copies = _copy_inputs(target, staging, inputs)
            yield staging
            for copy, before in copies.items():
                if _version(copy) == before:
                    copy.unlink()
            _prepare(staging, target)
            _commit(staging, target, target / f"{name}{COMPLETE}")


def finish_interrupted_save(folder: str | os.PathLike[str]) -> None:
    """Move the files of a complete save into `folder` if the writer was killed before it had moved them all.

    For readers, before they read. Where this process may not write, the files stay as they are.
    """
    target = Path(folder).resolve()
    for place in (target, target.parent):  # the folder of a further adapter is saved with the one it lies in
        if any(place.glob(f"{PREFIX}*{COMPLETE}")):
            with suppress(OSError), locked(place / TURN):
                _move_complete(place)


def read_together(paths: Sequence[Path], read: Callable[[], T]) -> T:
    """What `read()` returns, called again when one of the files it reads was replaced meanwhile.

    Args:
        paths: files of one folder that belong together.
        read: reads them.
    """
    for _ in range(ATTEMPTS - 1):
        before = versions(paths)
        try:
            found = read()
        except (ValueError, OSError):
            if versions(paths) == before:
                raise
        else:
            if versions(paths) == before:
                return found
    return read()


def versions(paths: Iterable[Path]) -> tuple[tuple[int, int] | None, ...]:
    """What changes when a file is replaced, for each file: inode and time of its last change; None if it is missing."""
    return tuple(_version(path) for path in paths)


def _version(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A new folder, removed if the block ends with an error."""
    folder.mkdir()
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _remove_leftovers(place: Path) -> None:
    """Remove what killed writers have left in a folder, and finish the save of one that was killed in its last step."""
    for alive in place.glob(f"{PREFIX}*{ALIVE}"):
        descriptor = hold_leftover(alive)
        if descriptor is not None:
            shutil.rmtree(alive.with_suffix(STAGING), ignore_errors=True)
            alive.unlink(missing_ok=True)
            release(descriptor)
    if (place / TURN).exists() or any(place.glob(f"{PREFIX}*{COMPLETE}")):
        with locked(place / TURN):
            _move_complete(place)


def _copy_inputs(target: Path, staging: Path, inputs: Iterable[str]) -> dict[Path, tuple[int, int] | None]:
    """Copy files into the staging folder; the copies, and the version of each."""
    copies = {}
    for path in (path for pattern in inputs for path in target.glob(pattern) if path.is_file()):
        copy = staging / path.relative_to(target)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        copies[copy] = _version(copy)
    return copies


def _prepare(staging: Path, target: Path) -> None:
    """Give files their permissions, bring them to disk, and look whether they can replace those of the target."""
    like = target if target.is_dir() else staging
    for path in staging.rglob("*.safetensors"):  # safetensors makes files that only their owner may read
        path.chmod(like.stat().st_mode & 0o666)
    for path in (*staging.rglob("*"), staging):
        there = target / path.relative_to(staging)
        if path.is_file() and there.is_dir():
            raise ValueError(f"{there} is a folder, where a file has to be written: move it away")
        sync_to_disk(path)


def _commit(staging: Path, target: Path, complete: Path) -> None:
    if staging.parent != target:
        try:
            os.rename(staging, target)
        except OSError:
            if not target.is_dir():
                raise
            # Another writer has made the target meanwhile.
        else:
            sync_to_disk(target.parent)
            return
    with locked(target / TURN):
        _move_complete(target)
        os.rename(staging, complete)
        sync_to_disk(target)
        _move_complete(target)


def _move_complete(target: Path) -> None:
    """Move the files of complete staging folders into the target; the caller holds its lock."""
    for complete in target.glob(f"{PREFIX}*{COMPLETE}"):
        # A reader that finds the config of a fresh folder finds the rest as well.
        for path in sorted(complete.rglob("*"), key=lambda path: path.name == CONFIG_FILE):
            if path.is_file():
                there = target / path.relative_to(complete)
                there.parent.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another process has moved it, on a file system without locks
                    os.replace(path, there)
        sync_to_disk(target)
        shutil.rmtree(complete, ignore_errors=True)
