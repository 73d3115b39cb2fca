"""A lock of a run on its results folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from cl_prompts.runtime.disk_full import explain_disk_full
from cl_prompts.runtime.locks import hold_exclusively, release


LOCK = ".training.lock"


class FolderInUseError(RuntimeError):
    """Another run uses the results folder."""


@contextmanager
def run_lock(folder: Path | None, accelerator: Accelerator, name: str = LOCK) -> Iterator[None]:
    """Within this context no other run can use the results folder. All processes of a run must enter it.

    The main process holds the lock. The system releases it when that process ends, also when it is killed.

    Args:
        folder: the results folder, created if it does not exist; None: nothing is locked.
        accelerator: the run's accelerator.
        name: name of the lock file in the folder.

    Raises:
        FolderInUseError: another run holds the lock. It is raised on every process of this run.
        OSError: the disk is full.
    """
    if folder is None:
        yield
        return
    path, descriptor, error = folder / name, None, ""
    if accelerator.is_main_process:
        with explain_disk_full(path):
            folder.mkdir(parents=True, exist_ok=True)
            held = hold_exclusively(path)
        if isinstance(held, int):
            descriptor = held
        else:
            who = "process {pid} on {host} since {since}".format_map(held) if held else "its process is unknown"
            stop = f"stop it (kill {held['pid']})" if held else "stop it"
            error = f"another run uses {folder} ({who}): wait for it, {stop}, or choose another results folder"
    try:
        (error,) = broadcast_object_list([error])
        if error:
            raise FolderInUseError(error)
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            release(descriptor)
