"""The PEFT type `PROMPT_POOL`, entered into PEFT's tables before the classes that it names are imported.

Importing them takes seconds, and within the import of PEFT two threads could wait for each other's imports.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


PEFT_TYPE = "PROMPT_POOL"
PREFIX = "prompt_pool"  # of the names of its tensors in a file


class _FirstUse:
    """Stands for a class in one of PEFT's tables until the class is called or asked for an attribute.

    Args:
        table: one of PEFT's tables, type -> class.
        register: replaces the entries of `PEFT_TYPE` by the classes.
    """

    def __init__(self, table: dict[Any, Any], register: Callable[[], None]) -> None:
        self._table = table
        self._register = register

    def _resolved(self) -> Any:
        self._register()
        return self._table[PEFT_TYPE]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._resolved()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._resolved(), name)


def enter_peft_type(mapping: ModuleType, register: Callable[[], None]) -> None:
    """Enter the type into the tables of PEFT.

    Args:
        mapping: the module `peft.mapping`.
        register: imports config and tuner and enters them; called on their first use.
    """
    for table in (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_TUNER_MAPPING):
        table.setdefault(PEFT_TYPE, _FirstUse(table, register))
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
