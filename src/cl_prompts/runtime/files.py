"""Atomic writes of single files."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file atomically: a reader finds the old content or the new, never a part. Missing folders are made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.writing")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    flush_to_disk(new)
    os.replace(new, target)


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Have the system write a file or folder to its disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
