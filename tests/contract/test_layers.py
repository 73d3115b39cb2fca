"""Rooms import only what the table of layers allows, in one direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT


PACKAGE = ROOT / "src" / "cl_prompts"
LOW = {"runtime", "interfaces", "outputs", "version"}

# Room (a folder, or a module at the root) -> the other rooms that its files may import: the table of docs/development.md.
MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "interfaces": set(),
    "outputs": set(),
    "runtime": set(),
    "storage": {"runtime", "version"},
    "backbones": {"runtime", "interfaces"},
    "heads": {"runtime", "interfaces"},
    "methods": {"runtime", "interfaces", "heads", "storage", "version"},
    "learner": {"runtime", "interfaces", "outputs", "heads", "storage"},
    "tuner": LOW | {"storage", "backbones", "heads", "methods", "learner"},
    "baselines": LOW | {"storage", "backbones", "heads", "learner"},
    "evaluation": {"runtime", "interfaces", "outputs", "heads", "learner"},
    "sharing": {"runtime", "storage", "methods", "evaluation", "version"},
    "model": LOW | {"storage", "backbones", "heads", "methods", "learner", "tuner", "sharing"},
    "auto": LOW | {"storage", "methods", "sharing", "model"},
    "pipeline": LOW | {"storage", "methods", "tuner", "sharing", "model", "auto"},
    "conversion": {"runtime", "storage"},
    "cli": LOW | {"storage", "methods", "sharing", "model", "auto", "pipeline", "continual", "runs", "conversion"},
    "runs": LOW | {"storage", "heads", "methods", "tuner", "baselines", "evaluation", "sharing", "model", "continual"},
    "__main__": {"cli"},
    "hf_trainer": {"interfaces", "outputs", "learner"},
    "continual": {"runtime", "interfaces", "outputs", "storage", "heads", "learner", "evaluation"},
    "__init__": LOW | {"methods", "tuner", "model", "auto", "pipeline"},
}

# Third-party packages that a room may not import.
FORBIDDEN: dict[str, set[str]] = {
    "runtime": {"transformers", "peft", "accelerate", "datasets", "huggingface_hub"},
    "storage": {"transformers", "peft", "accelerate", "datasets"},
    "interfaces": {"transformers", "peft", "accelerate", "datasets", "huggingface_hub"},
    "backbones": {"peft", "accelerate", "datasets", "huggingface_hub"},
    "heads": {"transformers", "peft", "accelerate", "datasets", "huggingface_hub"},
    "methods": {"transformers", "accelerate", "datasets", "huggingface_hub"},
    "conversion": {"peft", "accelerate", "datasets", "huggingface_hub"},
    "learner": {"transformers", "peft", "accelerate", "datasets", "huggingface_hub"},
    "tuner": {"accelerate", "datasets", "huggingface_hub"},
    "baselines": {"accelerate", "datasets", "huggingface_hub"},
    "continual": {"peft", "huggingface_hub"},
}
MATHEMATICS = {"torch", "math", "__future__", "collections", "dataclasses", "typing", "abc", "cl_prompts"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Absolute names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} is a relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_name(path): path for path in FILES}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def violations() -> set[str]:
    found = set()
    for path in FILES:
        room = room_of(path)
        for _, name in imported(path):
            parts = name.split(".")
            if parts[0] == "cl_prompts":
                if len(parts) > 1 and parts[1] in MAY_IMPORT and parts[1] != room and parts[1] not in MAY_IMPORT[room]:
                    found.add(f"{path.relative_to(PACKAGE)} imports {parts[1]}")
            elif parts[0] in FORBIDDEN.get(room, ()) or (path.name == "pool.py" and parts[0] not in MATHEMATICS):
                found.add(f"{path.relative_to(PACKAGE)} imports {parts[0]}")
    return found


def test_every_room_is_in_the_table() -> None:
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)


def test_rooms_import_only_what_the_table_allows() -> None:
    assert violations() == set()


def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, anywhere in the file."""
    edges: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        own = set()
        for _, target in imported(path):
            while target and target not in MODULES:
                target = target.rpartition(".")[0]
            if target and target not in (name, "cl_prompts.__init__"):
                own.add(target)
        edges[name] = own
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(edges[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            component = []
            while True:
                component.append(stack.pop())
                if component[-1] == node:
                    break
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_no_imports_go_in_a_circle() -> None:
    assert circles(graph()) == []


def test_the_search_for_circles_finds_one() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_at_most_nine_modules_stand_at_the_root() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 9


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_has_at_most_400_lines(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
