"""What `inspect` tells of an `adapter_config.json`, without the config classes, whose import takes seconds.

`methods.json` holds what these classes know of each method: title, papers, and the kind and default of each field. A test
compares it with the classes; `python tests/support/make_method_table.py` writes it.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cl_prompts.storage.adapter_files import AdapterFiles
from cl_prompts.storage.adapter_state import AdapterState


TABLE = Path(__file__).with_name("methods.json")
# Keys that PEFT writes: `find_adapter` has checked the first, the others say nothing of the adapter.
OF_PEFT = ("peft_type", "peft_version", "inference_mode")
LONGEST_TEXT = 1000  # of a setting, in characters; also the longest list


@dataclass(frozen=True)
class ConfigFacts:
    """Facts of an adapter's config.

    Args:
        title: the method in a line.
        papers: addresses of its papers.
        values: all fields that a file may have, with defaults where this one has none.
        settings: those of them that only this method has.
        state: tasks, classes and base.
    """

    title: str
    papers: list[str]
    values: dict[str, Any]
    settings: dict[str, Any]
    state: AdapterState


def config_facts(files: AdapterFiles) -> ConfigFacts:
    """Facts of an adapter's config. Values are of their kinds; whether they fit each other is checked by a load.

    Raises:
        ValueError: the method is unknown, a value is of another kind than its field, or the state is damaged.
    """
    saved = copy.deepcopy(dict(files.config))
    table = json.loads(TABLE.read_text())
    name = saved.pop("method", None)
    known = table["methods"].get(name) if isinstance(name, str) else None
    if known is not None:
        allowed = {**table["shared"], **known["fields"]}
        state = saved.pop("state", None)
        given = {key: value for key, value in saved.items() if key not in (*OF_PEFT, *known["retired_fields"])}
        if all(key in allowed and is_of_kind(value, allowed[key][0]) for key, value in given.items()):
            values = {"method": name} | {key: default for key, (_, default) in allowed.items()}
            values |= (known["older_values"] if state else {}) | given
            settings = {key: values[key] for key in known["fields"] if key not in table["shared"]}
            return ConfigFacts(
                known["title"],
                known["papers"],
                values,
                settings,
                AdapterState() if state is None else AdapterState.from_dict(state),
            )
    return facts_of_class(files)  # of a method from elsewhere, or with values on which its class has the last word


def facts_of_class(files: AdapterFiles) -> ConfigFacts:
    """The same from the config class, which also checks that the values fit each other.

    Raises:
        ValueError: as its `from_pretrained`.
    """
    from cl_prompts.methods import PromptPoolConfig

    config = PromptPoolConfig.from_pretrained(files)
    shared = {field.name for field in fields(PromptPoolConfig)}
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*OF_PEFT, "state")}
    values = {
        name: value
        for name, value in values.items()
        if name not in ("max_adapter_bytes", "strict_base", "verify", "declared")
    }
    settings = {name: value for name, value in values.items() if name not in shared}
    title = (type(config).__doc__ or "").splitlines()[0]
    return ConfigFacts(title, list(config.papers), values, settings, config.state)


def is_of_kind(value: Any, kind: str) -> bool:
    """Whether a value from JSON is of a kind, written as an annotation like "int" or "list[str] | None"."""
    kind, _, optional = kind.partition(" | ")
    if value is None:
        return bool(optional)
    if kind.startswith("list["):
        entries = isinstance(value, list) and len(value) <= LONGEST_TEXT
        return entries and all(is_of_kind(entry, kind[5:-1]) for entry in value)
    if kind == "dict":
        return isinstance(value, Mapping) and len(value) <= 20 and all(map(_is_scalar, (*value, *value.values())))
    return _is_scalar(value) and type(value) in {"float": (int, float)}.get(kind, (_SCALARS.get(kind),))


_SCALARS = {"int": int, "bool": bool, "str": str}


def _is_scalar(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST_TEXT
    return isinstance(value, bool | int | float) and abs(value) < 2**63 and math.isfinite(value)
