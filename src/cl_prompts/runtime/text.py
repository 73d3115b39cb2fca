"""Text of values, names and errors, made fit for the place where it is shown: a message, a terminal, Markdown or YAML.

Names and values come from files of strangers. Each place has one function, which bounds the length and leaves no character
that the place would interpret.
"""

from __future__ import annotations

import re
import reprlib
from typing import Any


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxtuple, _REPR.maxdict = 3, 24, 24, 6
_REPR.maxstring = _REPR.maxother = 160
_REPR.maxlong = 40
LONGEST = 600  # characters of a message
LONGEST_NAME = 100  # characters of a name, like that of a class
LONGEST_LINE = 2000  # characters of a line on a terminal or of code
_JOINERS = "\u200c\u200d"  # in words of some languages
# What Markdown and HTML interpret: anywhere in a line, or as the mark of a list at its beginning. Brackets are plain unless
# the address of a link follows, underscores within a word too; tables escape their bars.
_MARKDOWN = re.compile(
    r"[\\`*<>~#$&@]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.|^[-+=](?=[-+=\s]|$)"
    r"|(?:(?<=^\d)|(?<=^\d\d)|(?<=^\d\d\d))[.)](?=\s|$)",
    re.IGNORECASE,
)
_BACKTICKS = re.compile("`+")


def short_repr(value: Any) -> str:
    """The `repr` of a value, shortened to about 600 characters; omitted parts are shown as dots."""
    return _short(_REPR.repr(value))


def first_line(error: Exception | Warning) -> str:
    """The first line of an error's message, shortened to about 600 characters, with unprintable characters escaped."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _short(_escaped(text[: 2 * LONGEST]))


def terminal_text(text: str, longest: int = LONGEST_LINE) -> str:
    """A line for a terminal: control characters and those that turn the direction of text are escaped."""
    return _short(_escaped(text[: 2 * longest]), longest)


def plain_text(value: object, longest: int = LONGEST_NAME) -> str:
    """One line without unprintable characters, for YAML: line breaks become blanks, other such characters "?"."""
    words = " ".join(str(value)[: 10 * longest].split())
    return _short("".join(c if c.isprintable() or c in _JOINERS else "?" for c in words), longest)


def markdown_text(value: object, longest: int = LONGEST_NAME) -> str:
    """One line of text for Markdown: nothing in it is a heading, link, tag, comment, formula or emphasis."""
    return _MARKDOWN.sub(r"\\\g<0>", plain_text(value, longest))


def markdown_code(value: object, longest: int = LONGEST_NAME) -> str:
    """One line of code for Markdown, between back-ticks: more of them than stand together in it."""
    text = plain_text(value, longest).replace("<!--", "<! --")
    fence = _fence(text, 1)
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def markdown_block(value: str, language: str = "") -> str:
    """A block of code for Markdown, with its line breaks."""
    lines = [plain_text(line, LONGEST_LINE) for line in value[:LONGEST_LINE].splitlines()]
    text = "\n".join(lines).replace("<!--", "<! --")
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, _BACKTICKS.findall(text)), default=0))


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(text: str, longest: int = LONGEST) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
