"""Locks between threads and processes: files that are locked with `flock`.

The system releases a lock when its process ends, also when it is killed. So a lock file without a lock was left by a killed
process. Windows and some network file systems do not support `flock`: there a lock is granted at once, and a lock file
counts as left over when it is older than `LEFTOVER_SECONDS`.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
LEFTOVER_SECONDS = 24 * 3600.0

# Descriptors of the locks that this process holds. A fork closes its copies: else a data loader's worker would keep the
# lock of a killed process.
_held: set[int] = set()


def _close_in_fork() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


def hold(path: Path) -> int:
    """Create a lock file if needed and wait for its lock. Returns the open descriptor; pass it to `release`."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _flock(descriptor, wait=True) is not False and _is_open_as(path, descriptor):
            return _kept(descriptor)
        os.close(descriptor)  # the previous holder removed or renamed the file


def hold_leftover(path: Path) -> int | None:
    """Lock a lock file that was left over by a killed process. None if it is locked or does not exist."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    granted = _flock(descriptor, wait=False)
    if granted is None:
        granted = time.time() - os.fstat(descriptor).st_mtime > LEFTOVER_SECONDS
    if granted and _is_open_as(path, descriptor):
        return _kept(descriptor)
    os.close(descriptor)
    return None


def hold_exclusively(path: Path) -> int | dict[str, Any]:
    """Lock a lock file for this process without waiting, and write into it who holds it.

    Where locks are not supported, the file counts as locked if the process named in it runs, or may run on another host.

    Returns:
        The open descriptor for `release`, or the holder: "pid", "host" and "since"; empty if it cannot be read.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        granted = _flock(descriptor, wait=False)
        holder = _holder(path)
        if granted is False or (granted is None and _may_run(holder)):
            os.close(descriptor)
            return holder
        if _is_open_as(path, descriptor):
            break
        os.close(descriptor)  # the previous holder removed the file
    own = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())}
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps(own).encode())
    except OSError:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise
    return _kept(descriptor)


def release(descriptor: int) -> None:
    """Release a lock and close its descriptor. Does nothing in a fork of the process that holds it."""
    if descriptor not in _held:
        return
    _held.discard(descriptor)
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


def _kept(descriptor: int) -> int:
    _held.add(descriptor)
    return descriptor


def _flock(descriptor: int, *, wait: bool) -> bool | None:
    """Whether the lock was granted; None where locks are not supported."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _holder(path: Path) -> dict[str, Any]:
    """The content of a lock file of `hold_exclusively`; empty if it cannot be read."""
    try:
        content = json.loads(path.read_bytes()[:1000])
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and type(content.get("pid")) is int else {}


def _may_run(holder: dict[str, Any]) -> bool:
    if not holder or holder.get("host") != socket.gethostname() or os.name != "posix":
        return bool(holder)
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _is_open_as(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
