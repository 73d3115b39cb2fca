"""Calls a function as soon as a package has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def call_after_import(package: str, function: Callable[[], None]) -> None:
    """Call a function at the end of a package's first import; now if the package is imported already.

    Args:
        package: name of a package, like "peft". An import of a module in it imports the package first.
        function: is called in the thread that imports the package, before the import returns.
    """
    if package in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(package, function))


class _Finder(MetaPathFinder):
    """Finds one package by the other finders, and has `function` called after it."""

    def __init__(self, package: str, function: Callable[[], None]) -> None:
        self.package = package
        self.function = function

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the package, with a loader that calls the function; None for all other modules."""
        if name != self.package or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # so that the search does not come here again
        try:
            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    """Loads a package as its own loader does, then calls the finder's function."""

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """The module, as the package's own loader creates it."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the package, then the function."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.finder.function()
        sys.meta_path.remove(self.finder)  # after an error the next import comes here again
