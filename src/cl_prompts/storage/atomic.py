"""Saving a folder so that whoever looks finds the old content or the new, whole.

A save fills a folder beside the target, then swaps: target -> old, new -> target, old away. A process killed between
the two renames leaves no target but a complete new folder; `recover` finishes that swap. It runs before every load and
every save.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from cl_prompts.runtime.files import sync_to_disk


T = TypeVar("T")
ATTEMPTS = 50  # a process that saves all the time leaves a third of the loads or more alone
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _beside(target: Path) -> tuple[Path, Path]:
    return target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.replaced")


def recover(folder: str | os.PathLike[str]) -> None:
    """Finish a save of `folder` that was cut short between its two renames."""
    target = Path(folder).resolve()
    new, old = _beside(target)
    if old.exists() and not target.exists():
        # `old` exists only once `new` was complete and on disk.
        try:
            os.rename(new if new.exists() else old, target)
        except OSError:
            # The process that saves, or another one that came to load, was faster.
            if not target.exists():
                raise


def read_whole(folder: str | os.PathLike[str], read: Callable[[], T]) -> T:
    """What `read()` returns; tried again when it fails because a save swapped `folder` between two of its files."""
    for _ in range(ATTEMPTS - 1):
        before = _identity(folder)
        try:
            return read()
        except (ValueError, OSError, RuntimeError):  # the last is what torch raises when it maps a file that is gone
            if _identity(folder) == before:
                raise
    return read()


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _link_or_copy(source: str, destination: str) -> str:
    try:
        os.link(source, destination)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, destination)
    return destination


@contextmanager
def telling_full_disk(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what a full disk makes libraries raise into one line that says what to do.

    Raises:
        OSError: with the number of the error (ENOSPC, EDQUOT or EFBIG).
    """
    try:
        yield
    except Exception as error:
        # safetensors has no error of its own for it: the number stands in its text.
        told = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number not in FULL:
            raise
        text = f"no room to save {folder} ({os.strerror(number)}): free some and save again; what was there is unharmed"
        raise OSError(number, text) from error


def _working_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:  # somebody has removed it
        return None


@contextmanager
def replacing(folder: str | os.PathLike[str], *written: str) -> Iterator[Path]:
    """Give an empty-handed writer a folder that takes `folder`'s place when the block ends without an error.

    Files of `folder` other than `written` (names relative to it) are kept.

    Raises:
        ValueError: `folder` is a file.
    """
    target = Path(folder).resolve()
    if target.is_file():
        raise ValueError(f"{folder} is a file: name a folder to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    new, old = _beside(target)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        if target.exists():
            shutil.copytree(target, new, copy_function=_link_or_copy, symlinks=True)
            for name in written:
                (new / name).unlink(missing_ok=True)  # a link: writing through it would change the old file
        else:
            new.mkdir()
        yield new
        for path in new.rglob("*.safetensors"):  # safetensors lets nobody else read what it has written
            path.chmod(new.stat().st_mode & 0o666)
        for path in [*(p for p in new.rglob("*") if p.is_file() and not p.is_symlink()), new]:
            sync_to_disk(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    working = _working_folder()
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except FileNotFoundError:
        # Another process came to load between the renames and has finished the swap.
        if not target.exists():
            raise
    if working is not None and working.is_relative_to(target):
        os.chdir(working)  # this process still stood in the old folder
    sync_to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)
