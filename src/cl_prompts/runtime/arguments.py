"""Keyword arguments that a function passes on: unknown names are refused, because the receiver may ignore them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cl_prompts.runtime.text import short_repr


def refuse_unknown(function: str, given: Iterable[str], known: Collection[str]) -> None:
    """Check the names of keyword arguments.

    Args:
        function: name of the function, for the message.
        given: names of the arguments that the caller passed.
        known: names that are passed on.

    Raises:
        TypeError: a name is not in `known`.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{function} has no arguments {short_repr(unknown)}: besides its own it takes {sorted(known)}")
