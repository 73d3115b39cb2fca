"""Numbers computed once per image and kept in a private file, as records of one size by row number.

The file has no name, so no other process can shorten or change it, and it is gone with the last process that has it open.
Loader processes that are forked share it: what one of them has written, all can read. A record ends with a checksum, so one
that is not written, or only in part, is not taken for a whole one.
"""

from __future__ import annotations

import os
import tempfile
import weakref
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


CHECKSUM = 8  # bytes


class PrivateFile:
    """A new file without a name, open for reading and writing until this object is gone.

    Args:
        folder: where its content lies, or if it does not exist the nearest folder above it; None: the folder of temporary
            files.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is not None:
            folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
        with tempfile.TemporaryFile(dir=folder) as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._descriptor


class KeptRows:
    """An array [rows, *shape] in a file, of which rows may be missing.

    Args:
        file: holds the rows.
        shape: shape of a row.
        dtype: of the numbers.
    """

    def __init__(self, file: PrivateFile, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.size = record_size(shape, dtype)
        self._file = file

    def read(self, row: int) -> NDArray[Any] | None:
        """A copy of a row; None if it is missing."""
        record = os.pread(self._file.fileno(), self.size, row * self.size)
        content = memoryview(record)[:-CHECKSUM]
        if len(record) != self.size or record[-CHECKSUM:] != checksum(content):
            return None
        return np.frombuffer(bytearray(content), self.dtype).reshape(self.shape)

    def write(self, row: int, values: NDArray[Any]) -> None:
        """Keep a row.

        Raises:
            OSError: the disk is full.
        """
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        record, start = memoryview(content + checksum(content)), row * self.size
        while record:
            written = os.pwrite(self._file.fileno(), record, start)
            record, start = record[written:], start + written


def record_size(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of a row on the disk."""
    return int(np.prod(shape)) * np.dtype(dtype).itemsize + CHECKSUM


def checksum(content: bytes | memoryview) -> bytes:
    """Checksum of a record, never that of an empty file's zeros."""
    return (1 << 32 | zlib.crc32(content)).to_bytes(CHECKSUM, "little")
