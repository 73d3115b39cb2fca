"""A folder of un-prompted features that runs share: safetensors files, each named by its cache key.

Files are read into memory: each process holds 4 bytes per number, as in the run that computed them. A file that were mapped
could be cut off in place, which kills the process, or overwritten in place, which changes the features unseen. Files are
written under a temporary name and renamed. Of several writers of one key the last one wins; all write the same content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cl_prompts.storage.bounded_read import check_bounded
from cl_prompts.storage.staging import staging_folder


VARIABLE = "CL_PROMPTS_CACHE"  # environment variable with the folder of this library's caches
FEATURES = "features"
HEADER = 4096  # largest size of a file's header, in bytes
OWN = re.compile(r"[0-9a-f]{64}\.safetensors")


def folder_of_queries(query_cache: str | None) -> Path | None:
    """Folder of the query cache: `query_cache`, or `$CL_PROMPTS_CACHE/queries` if that is None; None: in memory only."""
    if query_cache is not None:
        return Path(query_cache) if query_cache else None
    root = os.environ.get(VARIABLE)
    return Path(root, "queries") if root else None


class QueryCache:
    """Tables of features by key.

    If a file cannot be read or written, that is reported and the features are computed again; no error is raised.

    Args:
        folder: folder of the files; other files in it are not touched.
        max_bytes: limit on the size of all files; the least recently used ones are removed.
        say: called with a message, one line, for each file that cannot be used or kept.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: Path, max_bytes: int, say: Callable[[str], object]) -> None:
        if folder.is_file():
            raise ValueError(f"query_cache={str(folder)!r} is a file: name a folder")
        self.folder, self.max_bytes, self.say = folder, max_bytes, say

    def path(self, key: str) -> Path:
        """Path of the file of a key."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """The table [rows, D] float32 of a key, in memory; None if there is no file or it is damaged."""
        path = self.path(key)
        try:
            metadata, table = _read_table(path)
            if metadata.get("key") != key:
                raise ValueError("it is that of other images or of another model")
            if metadata.get("sha256") != _sha256(table):
                raise ValueError("its numbers do not match their checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.say(f"query cache: {path} cannot be used ({error}) and is computed again")
            return None
        with suppress(OSError):  # not permitted if another user owns the file
            os.utime(path)
        return table

    def write(self, key: str, table: Tensor) -> bool:
        """Write a table [rows, D] float32 and remove old files if needed. Returns whether the table was written."""
        if table.nbytes + HEADER > self.max_bytes:
            self.say(f"query cache: {table.nbytes:,} bytes are not kept, query_cache_bytes is {self.max_bytes:,}")
            return False
        try:
            with staging_folder(self.folder) as staging:
                metadata = {"key": key, "sha256": _sha256(table)}
                save_file({FEATURES: table.contiguous()}, staging / self.path(key).name, metadata=metadata)
            self._remove_oldest(self.path(key))
        except (OSError, ValueError, SafetensorError) as error:
            self.say(f"query cache: nothing could be kept in {self.folder} ({error})")
            return False
        return True

    def _remove_oldest(self, kept: Path) -> None:
        """Remove the least recently used files, except `kept`, until the size of all is at most `max_bytes`."""
        files = []
        for path in self.folder.iterdir():
            if OWN.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process may remove files too
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size


def _read_table(path: Path) -> tuple[dict[str, str], Tensor]:
    """Metadata and table of a file, read into memory.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no regular file, or none that `QueryCache.write` wrote.
    """
    size = check_bounded(path, None)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER, size):
            raise ValueError("it is truncated or no safetensors file")
        header = json.loads(file.read(length))
        try:
            metadata, declared = dict(header["__metadata__"]), header[FEATURES]
            rows, width = declared["shape"]
            whole = declared["dtype"] == "F32" and min(rows, width) >= 0 and 8 + length + 4 * rows * width == size
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("its header is not that of a table of features") from error
        if not whole:
            raise ValueError("it is truncated, or no table of float32")
        table = torch.empty(rows, width)
        if file.readinto(table.view(-1).numpy().data) != table.nbytes:
            raise ValueError("it was truncated while it was read")
    return metadata, table


def _sha256(table: Tensor) -> str:
    return hashlib.sha256(table.contiguous().view(-1).numpy().data).hexdigest()
