"""Errors of a full disk as one line that names the file and says what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def explain_disk_full(path: str | os.PathLike[str], mend: str = "free some and save again") -> Iterator[None]:
    """Turn errors of a full disk into one line that names `path` and says what to do.

    Nested contexts: the outermost one words the error.

    Args:
        path: file or folder that is written.
        mend: what to do.

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
        text = f"no room to save {path} ({os.strerror(number)}): {mend}; what was there is unharmed"
        raise OSError(number, text) from error
