"""Locks between threads and processes: files that are locked with `flock`.

The system releases a lock when its process ends, also when it is killed. So a lock file without a lock was left by a killed
process. Windows and some network file systems do not support `flock`: there a lock is granted at once, and a lock file
counts as left over when it is older than `LEFTOVER_SECONDS`.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
LEFTOVER_SECONDS = 24 * 3600.0


def hold(path: Path) -> int:
    """Create a lock file if needed and wait for its lock. Returns the open descriptor; pass it to `release`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _flock(descriptor, wait=True) and _is_open_as(path, descriptor):
            return descriptor
        os.close(descriptor)  # the previous holder removed or renamed the file


def hold_leftover(path: Path) -> int | None:
    """Lock a lock file that was left over by a killed process. None if it is locked or does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    if _flock(descriptor, wait=False) and _is_open_as(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def release(descriptor: int) -> None:
    """Release a lock and close its descriptor, also if a forked process has a copy of the descriptor."""
    with suppress(OSError):  # flock is not supported here
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a path. The lock file is removed at the end."""
    descriptor = hold(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        release(descriptor)


def _flock(descriptor: int, *, wait: bool) -> bool:
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        return wait or time.time() - os.fstat(descriptor).st_mtime > LEFTOVER_SECONDS
    return True


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
