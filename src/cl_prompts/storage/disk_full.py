"""Errors of a full disk as one line that says what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_disk_full(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors of a full disk into one line that names `folder` and what to do.

    Raises:
        OSError: with the number of the error (ENOSPC, EDQUOT or EFBIG).
    """
    try:
        yield
    except Exception as error:
        # safetensors has no error of its own for it: the number stands in its text.
        match = re.search(r"os error (\d+)", str(error)) if isinstance(error, SafetensorError) else None
        number = int(match[1]) if match else getattr(error, "errno", None)
        if number not in NO_ROOM:
            raise
        text = f"no room to save {folder} ({os.strerror(number)}): free some and save again; what was there is unharmed"
        raise OSError(number, text) from error
