"""Un-prompted features kept over runs: a folder of safetensors files, each named after its cache key.

Files are mapped into memory when they are read, so that processes share what the system has loaded. They are written beside
their place and renamed: of several writers the last one wins, and all are right, since one key stands for one content.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cl_prompts.storage.staging import staging_folder


VARIABLE = "CL_PROMPTS_CACHE"  # names a folder for what this library keeps over runs
FEATURES = "features"
HEADER = 4096  # bytes that a file may have besides its numbers
OWN = re.compile(r"[0-9a-f]{64}\.safetensors")


def folder_of_queries(asked_for: str | None) -> Path | None:
    """Where queries are kept: as asked for, else in $CL_PROMPTS_CACHE; None: in memory only ("" asks for that)."""
    if asked_for is not None:
        return Path(asked_for) if asked_for else None
    root = os.environ.get(VARIABLE)
    return Path(root, "queries") if root else None


class QueryCache:
    """Tables of features by key.

    A file that cannot be read or written is reported and costs a pass over the images; it never ends a run.

    Args:
        folder: where the files lie; files of others in it are left alone.
        max_bytes: how much they may take together; the one whose last use is longest ago goes first.
        say: called with a line about each such event.

    Raises:
        ValueError: `folder` is a file.
    """

    def __init__(self, folder: Path, max_bytes: int, say: Callable[[str], object]) -> None:
        if folder.is_file():
            raise ValueError(f"query_cache={str(folder)!r} is a file: name a folder")
        self.folder, self.max_bytes, self.say = folder, max_bytes, say

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> Tensor | None:
        """The table [rows, D] float32 of a key, mapped from its file; None if there is none that is whole."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                table: Tensor = file.get_tensor(FEATURES)
            if metadata.get("key") != key:
                raise ValueError("it is that of other images or of another model")
            if table.dtype != torch.float32 or table.dim() != 2 or metadata.get("sha256") != _sha256(table):
                raise ValueError("its numbers do not match their checksum")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, SafetensorError) as error:
            self.say(f"query cache: {path} cannot be used ({error}) and is computed again")
            return None
        with suppress(OSError):  # the file of somebody else
            os.utime(path)
        return table

    def write(self, key: str, table: Tensor) -> bool:
        """Keep a table [rows, D] float32 and make room for it; returns whether it is kept."""
        if table.nbytes + HEADER > self.max_bytes:
            self.say(f"query cache: {table.nbytes:,} bytes are not kept, query_cache_bytes is {self.max_bytes:,}")
            return False
        try:
            with staging_folder(self.folder) as staging:
                metadata = {"key": key, "sha256": _sha256(table)}
                save_file({FEATURES: table.contiguous()}, staging / self.path(key).name, metadata=metadata)
            self._make_room(self.path(key))
        except (OSError, ValueError, SafetensorError) as error:
            self.say(f"query cache: nothing could be kept in {self.folder} ({error})")
            return False
        return True

    def _make_room(self, kept: Path) -> None:
        """Remove files by their last use until the rest and `kept` fit."""
        found = []
        for path in self.folder.iterdir():
            if OWN.fullmatch(path.name):
                with suppress(FileNotFoundError):  # another process makes room as well
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size


def _sha256(table: Tensor) -> str:
    return hashlib.sha256(table.contiguous().view(-1).numpy().data).hexdigest()
