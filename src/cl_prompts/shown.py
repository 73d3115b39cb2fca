"""Values from files in messages: one line, and short whatever the file holds."""

from __future__ import annotations

import reprlib
from typing import Any


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 24, 24, 6
_REPR.maxstring = _REPR.maxother = 160
_REPR.maxlong = 40
LONGEST = 600  # characters


def shown(value: Any) -> str:
    """The value as Python writes it, with dots for what is too much."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
