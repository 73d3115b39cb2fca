"""Short text of values and errors, for messages."""

from __future__ import annotations

import reprlib
from typing import Any


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 24, 24, 6
_REPR.maxstring = _REPR.maxother = 160
_REPR.maxlong = 40
LONGEST = 600  # characters


def short_repr(value: Any) -> str:
    """The `repr` of a value, shortened to about 600 characters; omitted parts are shown as dots."""
    return _short(_REPR.repr(value))


def first_line(error: Exception) -> str:
    """The first line of an error's message, shortened to about 600 characters, with unprintable characters escaped."""
    text = (str(error) or type(error).__name__).strip().splitlines()[0]
    return _short("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
