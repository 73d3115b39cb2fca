"""Atomic writes of single files."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from cl_prompts.runtime.disk_full import explain_disk_full
from cl_prompts.runtime.locks import hold, hold_leftover, release


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file atomically: readers get the old or the new content, never a part. Of several writers the last one wins.

    Args:
        path: the file; missing folders are created.
        content: text, written as UTF-8, or bytes.

    Raises:
        OSError: the disk is full. The old file is kept.
    """
    with staging_file(path) as staging:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def staging_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty file next to `path` that replaces `path` when the context ends without an error.

    Each writer has its own staging file and holds a lock on it. Staging files of killed writers are removed.
    Write to the existing file. Do not replace it, as `safetensors.torch.save_file` does.

    Args:
        path: the file; missing folders are created.

    Raises:
        OSError: the disk is full. The old file is kept.
    """
    target = Path(path)
    with explain_disk_full(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{glob.escape(target.name)}.*.writing"):
            _remove_if_dead(leftover)
        staging = target.with_name(f".{target.name}.{uuid4().hex}.writing")
        descriptor = hold(staging)
        try:
            yield staging
            os.fsync(descriptor)
            os.replace(staging, target)
        except BaseException:
            staging.unlink(missing_ok=True)
            raise
        finally:
            release(descriptor)


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are written to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_dead(leftover: Path) -> None:
    descriptor = hold_leftover(leftover)
    if descriptor is not None:
        leftover.unlink(missing_ok=True)
        release(descriptor)
