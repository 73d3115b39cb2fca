"""Reading files of strangers: regular files only, and none that is larger than its kind may be.

Every file that comes with an adapter or a base is read here, or measured here before a library maps it.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from cl_prompts.runtime.text import first_line


MIB = 2**20
MAX_ADAPTER_BYTES = 8192 * MIB  # adapter_model.safetensors, unless a config says otherwise
MAX_CONFIG_BYTES = 8 * MIB  # adapter_config.json: a hundred thousand classes with their names
MAX_BASE_CONFIG_BYTES = 4 * MIB  # config.json and the index of the weights of a base
MAX_PROCESSOR_BYTES = MIB
MAX_RESULTS_BYTES = 4 * MIB  # more than a thousand tasks
MAX_CARD_BYTES = MIB
MAX_HEADER_BYTES = MIB  # of a safetensors file: some eight thousand tensors


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a device, a pipe or a socket, or has more than `max_bytes`.
    """
    check_bounded(path, max_bytes)
    # A pipe that has taken the file's place meanwhile: without O_NONBLOCK, opening it waits for a writer.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        content = file.read(max_bytes + 1)  # it may grow meanwhile
    if len(content) > max_bytes:
        raise too_large(path, len(content), max_bytes)
    return content


def check_bounded(path: Path, max_bytes: int | None) -> int:
    """The size in bytes of a regular file that another library is going to read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `read_bounded`; with `max_bytes` None any size is accepted.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a folder, a device or a pipe: put a regular file there")
    if max_bytes is not None and status.st_size > max_bytes:
        raise too_large(path, status.st_size, max_bytes)
    return status.st_size


def read_json_object(path: Path, max_bytes: int, max_entries: int | None = None) -> dict[str, Any]:
    """The JSON object in a regular file; a byte-order mark is skipped.

    Args:
        path: the file.
        max_bytes: as in `read_bounded`.
        max_entries: largest number of commas, which bounds the time that a check of every entry takes; None: any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as in `read_bounded`, or it holds no JSON object.
    """
    content = read_bounded(path, max_bytes)
    if max_entries is not None and content.count(b",") > max_entries:
        raise ValueError(f"{path} has more than {max_entries:,} entries: the file is not what its name says")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or no JSON ({first_line(error)}): fetch or save it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object: fetch or save it again")
    return found


def too_large(path: object, size: int, max_bytes: int) -> ValueError:
    """The error for a file of `size` bytes where at most `max_bytes` are accepted."""
    of_weights = str(path).endswith(".safetensors")
    mend = "raise max_adapter_bytes if you trust it" if of_weights else "the file is not what its name says"
    return ValueError(f"{path} has {size:,} bytes, more than the limit of {max_bytes:,}: {mend}")
