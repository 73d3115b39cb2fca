"""Messages on stderr, one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cl_prompts.runtime.text import terminal_text


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print this library's warnings as one line each on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as DeprecationWarning of other libraries
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_: print_to_stderr(message, "warning: ")
        yield


def print_to_stderr(message: Warning | str | Exception, kind: str = "") -> None:
    """Print a message after the command's name, fit for a terminal."""
    text = str(message) or type(message).__name__
    print(terminal_text(f"cl-prompts: {kind}{' '.join(text.split())}"), file=sys.stderr)
