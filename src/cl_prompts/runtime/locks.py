"""Locks between threads and processes: files that are locked with `flock`.

The system releases such a lock when the process that holds it ends, however it ends. So a lock file that nobody holds is
the leftover of a killed process. Some network file systems have no locks, and neither has Windows: there a lock is
granted without waiting, and a leftover is known by its age.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
LEFTOVER_SECONDS = 24 * 3600.0  # age from which an unlockable file counts as a leftover


def hold(path: Path) -> int:
    """Make a lock file if there is none, wait for its lock, and return the open descriptor, to be given to `release`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _flock(descriptor, wait=True) and _is_open_as(path, descriptor):
            return descriptor
        os.close(descriptor)  # the holder before has removed or renamed it


def hold_leftover(path: Path) -> int | None:
    """As `hold`, for a lock file whose holder is dead; None if it is alive, or there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    if _flock(descriptor, wait=False) and _is_open_as(path, descriptor):
        return descriptor
    os.close(descriptor)
    return None


def release(descriptor: int) -> None:
    """Let go of a lock. A copy of the descriptor in a forked process keeps nothing locked."""
    with suppress(OSError):  # there was no lock
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a path; the file exists only meanwhile."""
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
