"""What a public name's docstring must say, compared with the code: parameters, shapes of tensors, errors, papers.

A parameter is told of by an entry under Args, or in a sentence that has its `name`; a method's also in a sentence of its
class. What a method overrides has a docstring too, and what that one says need not be said again.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from support.documentation_blocks import ROOT


PACKAGES = (
    "cl_prompts",
    "cl_prompts.heads",
    "cl_prompts.methods",
    "cl_prompts.continual",
    "cl_prompts.baselines",
)
# "Title", VENUE 2023, or Names et al., VENUE 2023, or either with its arXiv number.
PAPER = re.compile(r"(?:\"[^\"]{12,}\"|et al\.),?[^.]*?(?:\b(?:19|20)\d\d\b|\barXiv[ :]\d{4}\.\d{4,5}\b)")
Docs = Sequence[str]


def exported() -> list[str]:
    """Every class and function in the `__all__` of the public packages, as package.name."""
    names = [f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__]
    return [name for name in names if inspect.isclass(found(name)) or inspect.isfunction(found(name))]


def shown() -> list[str]:
    """Every object that a page of the API reference shows."""
    texts = [page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md"))]
    return [name for text in texts for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


def found(path: str) -> Any:
    """The object at a dotted path."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def names_paper(thing: Any) -> bool:
    """Whether a docstring says where it was published."""
    return bool(PAPER.search(_told(thing.__doc__)))


def gaps(thing: Any) -> list[str]:
    """What the docstrings of a class with its public methods, or of a function, do not say."""
    if not inspect.isclass(thing):
        return [f"{thing.__qualname__}: {gap}" for gap in _gaps_of_function(thing, [thing.__doc__ or ""])]
    told = [f"{thing.__qualname__}: {gap}" for gap in _gaps_of_class(thing)]
    of_class = " ".join(_told(cls.__doc__) for cls in _own(thing))
    for name, member in vars(thing).items():
        if name == "__call__" or not name.startswith("_"):
            docs = [vars(cls)[name].__doc__ or "" for cls in thing.__mro__ if name in vars(cls)]
            told += [f"{thing.__qualname__}.{name}: {gap}" for gap in _gaps_of_member(member, docs, of_class)]
    return told


def _own(cls: type) -> list[type]:
    """A class and its bases, without those of other libraries."""
    return [base for base in cls.__mro__ if base.__module__.split(".")[0] == cls.__module__.split(".")[0]]


def _gaps_of_class(cls: type) -> Iterator[str]:
    """A class's docstring speaks of what it is made with."""
    docs = [base.__doc__ or "" for base in _own(cls)]
    if not docs[0] or docs[0].startswith(f"{cls.__name__}("):  # what dataclasses write where there is none
        yield "no docstring"
        return
    if "__dataclass_fields__" in vars(cls):
        inherited = {f.name for base in cls.__mro__[1:] if dataclasses.is_dataclass(base) for f in dataclasses.fields(base)}
        fields = [f for f in dataclasses.fields(cls) if f.init and f.name not in inherited]
        yield from _gaps_of_parameters({f.name: str(f.type) for f in fields}, docs)
        yield from _gaps_of_errors(vars(cls).get("__post_init__"), docs)
    elif inspect.isfunction(own := vars(cls).get("__init__")):
        yield from _gaps_of_parameters(_parameters(own), docs)
        yield from _gaps_of_errors(own, docs)


def _gaps_of_member(member: Any, docs: Docs, of_class: str) -> Iterator[str]:
    if isinstance(member, property):
        if not docs[0]:
            yield "no docstring"
        elif _is_tensor(member.fget.__annotations__.get("return")) and "[" not in "".join(docs):
            yield "a tensor without a shape"
        return
    function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
    if inspect.isfunction(function):
        yield from _gaps_of_function(function, docs, of_class)


def _gaps_of_function(function: Any, docs: Docs, of_class: str = "") -> Iterator[str]:
    if not docs[0]:
        yield "no docstring"
        return
    yield from _gaps_of_parameters(_parameters(function), docs, of_class)
    told = "".join(map(_told, docs))
    if _is_tensor(function.__annotations__.get("return")) and "[" not in told and "scalar" not in told:
        yield "returns a tensor and tells no shape"
    yield from _gaps_of_errors(function, docs)


def _parameters(function: Any) -> dict[str, str]:
    """Name -> annotation; without self and cls."""
    named = inspect.signature(function).parameters.values()
    return {p.name: str(p.annotation) for p in named if p.name not in ("self", "cls") and not p.name.startswith("_")}


def _gaps_of_parameters(parameters: dict[str, str], docs: Docs, of_class: str = "") -> Iterator[str]:
    entries = {name: text for doc in reversed(docs) for name, text in _entries(doc, "Args").items()}
    prose = " ".join([*map(_told, docs), of_class])
    for name, annotation in parameters.items():
        # From its name on, to the end of the sentence.
        text = entries.get(name, " ".join(re.findall(rf"`\**{name}`[^.]*", prose)))
        if not text:
            yield f"says nothing of {name!r}"
        elif _is_tensor(annotation) and "[" not in text and "scalar" not in text:
            yield f"tells no shape of the tensor {name!r}"
    for name in _entries(docs[0], "Args"):
        if name not in parameters:
            yield f"Args name {name!r}, which is no parameter of its own"


def _gaps_of_errors(function: Any, docs: Docs) -> Iterator[str]:
    if inspect.isfunction(function):
        told = {name.rpartition(".")[2] for doc in docs for name in _entries(doc, "Raises")}
        for name in sorted(_raised(function) - told):
            yield f"raises {name}, Raises does not say when"


@cache
def _raised(function: Any) -> frozenset[str]:
    """Names of the exceptions that a function raises itself, or through private functions of its module or class."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id[0].isupper() and raised.id != "NotImplementedError":
                names.add(raised.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            owner = function.__globals__.get(function.__qualname__.rpartition(".")[0])
            helper = function.__globals__.get(name) if isinstance(node.func, ast.Name) else getattr(owner, name, None)
            if name.startswith("_") and inspect.isfunction(helper) and helper is not function:
                names |= _raised(helper)
    return frozenset(names)


def _is_tensor(annotation: Any) -> bool:
    """Whether there is a tensor that has one shape: alone, in a list or a tuple, but not by name in a mapping."""
    return bool(re.search(r"\bTensor\b", str(annotation))) and not re.search(
        r"dict\[|Mapping\[|Callable\[", str(annotation)
    )


def _section(doc: str, name: str) -> str:
    """The text of a section, without its indentation."""
    lines = inspect.cleandoc(doc).splitlines()
    if f"{name}:" not in lines:
        return ""
    start = lines.index(f"{name}:") + 1
    end = next((n for n in range(start, len(lines)) if lines[n] and not lines[n].startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[start:end]))


def _told(doc: str | None) -> str:
    """The sentences of a docstring: without the sections that speak of arguments and errors, in one line."""
    doc = inspect.cleandoc(doc or "")
    for name in ("Args", "Raises"):
        if section := _section(doc, name):
            doc = doc.replace(textwrap.indent(section, "    "), "")
    return " ".join(doc.split())


def _entries(doc: str, section: str) -> dict[str, str]:
    """Name -> text of the entries of a section."""
    pieces = re.split(r"^([*\w.]+):", _section(doc, section), flags=re.MULTILINE)
    return {name.lstrip("*"): text for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}
